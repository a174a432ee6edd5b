"""The markdown of a run, from the content of ``on-gpu.json`` alone."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.on_gpu.limited import BY_ITSELF
from benchmarks.on_gpu.results import label

#: A step's result; any entry may be missing, since the step may have been killed.
Result = Mapping[str, Any]


def failed(record: Mapping[str, Any]) -> bool:
    """Whether a step failed, found something wrong, or found nothing that it could check."""
    return any(_is_bad(step) for step in record["steps"])


def _is_bad(step: Mapping[str, Any]) -> bool:
    verdict = _verdict(step)
    bad = verdict in ("DIFFERS", "ERRORS", "unfinished") or verdict.startswith("nothing")
    return bad or step["ended"] != BY_ITSELF


def _verdict(step: Mapping[str, Any]) -> str:
    return str((step["result"] or {}).get("verdict", "unfinished"))


def markdown(record: Mapping[str, Any]) -> str:
    """The report; a dry run says so in its first line."""
    results = {step["name"]: step["result"] or {} for step in record["steps"]}
    device = results.get("device", {})
    name = device.get("properties", {}).get("name", "an unknown device")
    title = f"# On a GPU: {name}"
    if record["dry_run"]:
        title = "# A dry run without a GPU: no number here was measured"
    command = shlex.join(["python", "-m", "benchmarks.on_gpu", *record["argv"]])
    lines = [title, "", f"* `{command}`, {record['date']}", *_machine(device), ""]
    steps = [
        [
            step["name"],
            f"**{_verdict(step)}**" if _is_bad(step) else _verdict(step),
            ": ".join(text for text in (step["ended"], step["reason"]) if text),
            f"{step['seconds']:.0f}",
            f"{step['limit_s']:.0f}",
        ]
        for step in record["steps"]
    ]
    lines.append(_table(["step", "verdict", "ended", "s", "of at most"], steps, texts=3))
    for step, section in SECTIONS.items():
        if results.get(step):
            lines += [f"\n## {step}\n", section(results[step])]
    return "\n".join(lines).rstrip() + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 2) -> str:
    """A markdown table; the first ``texts`` columns are aligned left, the others right."""
    lines = [f"| {' | '.join(header)} |", "|---" * texts + "|--:" * (len(header) - texts) + "|"]
    cells = ([_in_a_line(cell).replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def _in_a_line(value: object) -> str:
    """What a message says, without its line breaks and without more than its beginning."""
    text = " ".join(str(value).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _list(entries: Mapping[str, Any]) -> list[str]:
    known = {name: value for name, value in entries.items() if value not in (None, "")}
    return [f"* {name}: {_in_a_line(value)}" for name, value in known.items()]


def _machine(device: Result) -> list[str]:
    """What was run on, in a few lines; ``device.json`` has all of it."""
    found, properties = device.get("environment", {}), device.get("properties", {})
    shown = ("name", "gcnArchName", "major", "minor", "multi_processor_count", "L2_cache_size")
    entries = {name: properties.get(name) for name in shown}
    gpus = device.get("nvidia_smi")
    if isinstance(gpus, list):
        gpus = "; ".join(_pairs(gpu) for gpu in gpus)
    names = ("python", "torch", "cuda", "hip", "triton", "llm_sampling")
    commit = found.get("commit")
    return _list(
        {
            "commit": f"{commit} with changes" if found.get("modified") else commit,
            "device": _pairs({name: value for name, value in entries.items() if value is not None}),
            "nvidia-smi": gpus,
            "MPS": device.get("mps"),
            "versions": _pairs({name: found[name] for name in names if found.get(name)}),
            "backends": _pairs(found.get("backends", {})),
        }
    )


def _pairs(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in entries.items())


def _absent(result: Result) -> list[str]:
    return _list({f"absent: {name}": why for name, why in result.get("absent", {}).items()})


def _reached(result: Result, lines: Sequence[Result], names: Sequence[str]) -> list[str]:
    """How much of the plan was reached, and what was not: who, on which shape, and how often."""
    plan = result.get("plan", ())
    done = {label(*(line[name] for name in names)) for line in lines}
    missing = Counter(line.partition(": ")[0] for line in plan if line not in done)
    text = [f"* {len(lines)} of {len(plan)} were reached"]
    listed = ", ".join(f"{what} ({count})" for what, count in missing.items())
    return [*text, f"* missing: {listed}"] if missing else text


def _self_test(result: Result) -> str:
    rows = [
        [
            line["backend"],
            line["skipped"] or line["difference"] or "equal",
            line["shapes"],
            line["rows"],
        ]
        for line in result.get("backends", ())
    ]
    return _table(["backend", "known rows", "launch shapes", "rows"], rows)


def _parity(result: Result) -> str:
    found = result.get("comparisons", ())
    lines = _absent(result)
    keys = ("backend", "rows", "vocab_size", "dtype", "form")
    lines += _reached(result, found, keys)
    groups: dict[tuple[str, str, int], list[Result]] = {}
    for line in found:
        key = line["backend"], line["dtype"], line["vocab_size"]
        groups.setdefault(key, []).append(line)
    rows = [
        [
            backend,
            dtype,
            f"{vocab_size:,}",
            ", ".join(str(rows) for rows in dict.fromkeys(line["rows"] for line in group)),
            f"{sum(line['compared'] for line in group):,}",
            f"{sum(line['differ'] for line in group):,}",
            sum(line["error"] is not None for line in group),
        ]
        for (backend, dtype, vocab_size), group in groups.items()
    ]
    header = ["backend", "dtype", "V", "rows", "compared", "differ", "errors"]
    lines += ["", _table(header, rows)]
    first = next((line for line in found if line["differ"] or line["error"]), None)
    if first is not None:
        shown = {name: value for name, value in first.items() if name != "example"}
        lines += ["", "The first difference:", "", *_list(shown | first.get("example", {}))]
    return "\n".join(lines)


def _threads(result: Result) -> str:
    rows = [
        [
            line["backend"],
            f"{line['rows']} x {line['vocab_size']:,}",
            f"{line['compared']:,}",
            f"{line['differ']:,}",
            (line["error"].strip().split("\n") or [""])[-1],
        ]
        for line in result.get("lines", ())
    ]
    steps = f"* {result.get('steps', '?')} steps; the last that began: {result.get('running', '-')}"
    header = ["backend", "logits", "compared", "differ", "error"]
    reached = _reached(result, result.get("lines", ()), ("backend", "rows", "vocab_size"))
    return "\n".join([*_absent(result), steps, *reached, "", _table(header, rows)])


def _sanitizers(result: Result) -> str:
    rows = [
        [
            line["backend"],
            line["tool"],
            ": ".join(text for text in (line["how"], line["reason"]) if text),
            line["summary"] or "-",
        ]
        for line in result.get("lines", ())
    ]
    header = ["backend", "tool", "ended", "its summary"]
    return "\n".join([*_absent(result), "", _table(header, rows, texts=4)])


def _times(result: Result) -> str:
    lines = result.get("lines", ())
    bytes_per_us = result.get("bytes_per_us")
    text = _absent(result)
    text += [
        f"* {result.get('dtype')} logits; medians in µs per launch of launches in a CUDA graph",
        "* cold: each launch reads another buffer, together twice the L2 cache; hot: all read one",
        "* reads: cold, as a multiple of the time of one read of the logits at a copy's bandwidth",
        "* after a product: a product of two matrices before each launch, less the products alone",
        "* one element + 1: a kernel that changes one number, which is a launch and nothing else",
        "* all parameters: the penalties' counts stay in the L2 cache",
    ]
    if bytes_per_us:
        text.append(f"* a large copy moves {bytes_per_us / 1e6:.2f} TB/s, read and written")
    text += [f"* clocks: {clocks}" for clocks in result.get("clocks", ())]
    text += _reached(result, lines, ("who", "rows", "vocab_size", "kind"))
    shapes = sorted({(line["vocab_size"], line["rows"]) for line in lines})
    for vocab_size, rows in shapes:
        mine = [line for line in lines if (line["vocab_size"], line["rows"]) == (vocab_size, rows)]
        read_us = 2 * rows * vocab_size / bytes_per_us if bytes_per_us else None
        text += [f"\n### V = {vocab_size:,}, {rows} row{'s' * (rows > 1)}\n"]
        header = ["who", "kind", "cold (p10-p90)", "reads", "hot", "after a product"]
        text.append(_table(header, (_time_cells(line, read_us) for line in mine)))
    return "\n".join(text)


def _time_cells(line: Result, read_us: float | None) -> list[str]:
    if "cold" not in line:
        return [line["who"], line["kind"], f"- {line['reason']}", "", "", ""]
    cold = line["cold"]
    return [
        line["who"],
        line["kind"],
        f"{cold['median']:.2f} ({cold['p10']:.2f}-{cold['p90']:.2f})",
        f"{cold['median'] / read_us:.1f}" if read_us else "",
        f"{line['hot']['median']:.2f}",
        f"{line['after_product_us']:.2f}",
    ]


def _predicted(result: Result) -> str:
    rows = []
    for line in result.get("lines", ()):
        measured, (least, most) = line["measured_us"], line["predicted_us"]
        predicted = f"{least:.2f}" if least == most else f"{least:.2f}-{most:.2f}"
        ratio = f"{measured / least:.2f}"
        ratio = ratio if least == most else f"{measured / most:.2f}-{ratio}"
        cells = [line["kind"], f"{line['vocab_size']:,}", line["rows"]]
        rows.append([*cells, f"{measured:.2f}", predicted, ratio])
    header = ["kind", "V", "rows", "measured, cold, µs", "predicted, µs", "measured / predicted"]
    text = f"* predicted for {result.get('device', '?')} by {result.get('file', '?')}"
    return "\n".join([text, "", _table(header, rows, texts=1)] if rows else [text])


#: Step -> its section. The device's is at the top of the report.
SECTIONS: Mapping[str, Callable[[Result], str]] = {
    "self_test": _self_test,
    "parity": _parity,
    "threads": _threads,
    "sanitizers": _sanitizers,
    "times": _times,
    "predicted": _predicted,
}

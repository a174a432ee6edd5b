"""Stand-ins for packages: modules that are written to a folder, from which they are imported."""

from collections.abc import Mapping
from pathlib import Path


def write(
    folder: Path,
    package: str,
    sources: Mapping[str, str],
    changes: tuple[tuple[str, str, str], ...],
) -> None:
    """Write a package into ``folder``; a change is (module, text, replacement)."""
    sources = dict(sources)
    for module, old, new in changes:
        assert sources[module].count(old) >= 1, f"{module} has no {old!r}"
        sources[module] = sources[module].replace(old, new)
    for module, source in sources.items():
        path = folder.joinpath(package, *module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")

"""Tests of examples/tune_training.py: how it trains, judges and compares its models."""

import json
import math

import pytest
import torch

pytest.importorskip("optuna", reason="needs the extra 'tune'")

from examples import tune_training as example
from llm_sampling import SamplingParams

BOOK = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on. A dog that sleeps does "
    "not mind a fox; a fox that jumps does not mind a dog. So both are happy, said the hen. "
) * 12
VALUES = {
    "layers": 1,
    "width": 32,
    "epochs": 3,
    "learning_rate": 5e-3,
    "decay": "time",
    "decay_rate": 0.1,
    "batch_size": 8,
}
CONTEXT = 16


def trained(text, seed=0, context=CONTEXT, **changed):
    """Return a model that is trained with VALUES and changes to them, and its loss curves."""
    values, curves = VALUES | changed, example.Curves()
    generator = torch.Generator().manual_seed(seed)
    model = example.new_model(len(text.vocabulary), context, values, generator)
    for loss in example.train(model, text, values, generator, curves):
        assert loss == curves.validation[-1]
    return model, curves


@pytest.fixture(scope="module")
def text():
    return example.split(BOOK, 2000)


@pytest.fixture(scope="module")
def model(text):
    return trained(text)[0]


# ---- the text and the model ----------------------------------------------------------------------


def test_a_text_is_split_into_its_beginning_and_its_last_tenth():
    text = example.split("abcabcabcdabcabcabce", 6)
    assert text.vocabulary == "abcde"
    assert (text.decode(text.train.tolist()), text.decode(text.validation.tolist())) == (
        "abcabc",
        "ce",
    )
    # However many characters are asked for, the training text never includes the validation text.
    assert len(example.split("ab" * 10, 99).train) == 18


def test_windows_tile_the_text_and_a_target_is_the_next_token():
    inputs, targets = example.windows(torch.arange(8), 3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_later_token_changes_no_earlier_logits(text):
    generator = torch.Generator().manual_seed(1)
    model = example.new_model(30, CONTEXT, VALUES | {"layers": 3, "width": 64}, generator)
    ids = torch.randint(30, (2, CONTEXT), generator=generator)
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % 30
    differs = (model(ids) - model(changed)).abs().amax(-1) > 1e-4
    assert not differs[:, :9].any()
    assert differs[:, 9:].all()  # the changed token and all later ones depend on it


def test_the_order_of_earlier_tokens_matters():
    generator = torch.Generator().manual_seed(1)
    model = example.new_model(30, CONTEXT, VALUES, generator)
    ids = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]])
    last = model(ids)[:, -1]
    assert (last[0] - last[1]).abs().max() > 1e-3


# ---- training ------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_losses_and_leaves_the_global_state_alone(text):
    before = torch.get_rng_state()
    first, second, other = trained(text), trained(text), trained(text, seed=1)
    assert first[1] == second[1]
    assert first[1] != other[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_learns_more_than_how_frequent_the_characters_are(text):
    shares = torch.bincount(text.train) / len(text.train)
    unigram_entropy = -(shares[shares > 0] * shares[shares > 0].log()).sum().item()
    curves = trained(text, epochs=6)[1]
    assert curves.train[-1] < unigram_entropy - 0.5
    assert curves.train[-1] < curves.train[0]


def test_the_loss_is_that_of_each_token_given_those_before(text, model):
    ids = text.validation[: 2 * CONTEXT + 1]
    want = 0.0
    for begin in (0, CONTEXT):
        for end in range(begin + 1, begin + CONTEXT + 1):
            logprobs = model(ids[None, begin:end])[0, -1].log_softmax(-1)
            want -= logprobs[ids[end]].item() / (2 * CONTEXT)
    assert example.loss_on(model, ids) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("time", lambda epoch: 0.01 / (1 + 0.3 * epoch)),
        ("step", lambda epoch: 0.01 * math.exp(-0.3 * (epoch // 4 * 4))),
        ("exponential", lambda epoch: 0.01 * math.exp(-0.3 * epoch)),
    ],
)
def test_a_schedule_is_its_formula(name, formula):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    schedule = example.schedule(name, optimizer, 0.3)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([formula(epoch) for epoch in range(10)], rel=1e-12)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="one of time, step, exponential, got 'cosine'"):
        example.schedule("cosine", None, 0.3)


def test_training_follows_its_schedule(text):
    """The decay rate is so large that epochs after the first decay change nothing."""
    losses = trained(text, decay="exponential", decay_rate=50.0)[1].train
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    losses = trained(text, decay="step", decay_rate=50.0)[1].train
    assert losses[2] < losses[0] - 0.05  # the first step comes later


# ---- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "validation", "name"),
    [
        # The validation loss rose by 5 % after its minimum.
        ([2.5, 1.9, 1.5], [2.6, 2.0, 2.1], "overfits"),
        # The validation loss is 3 % above the best model's, and the training loss is below its.
        ([2.5, 1.9, 1.5], [2.6, 2.05, 2.06], "overfits"),
        # The validation loss rose by 1.5 % and is 1.5 % above the best model's: not enough.
        ([2.5, 1.9, 1.5], [2.6, 2.0, 2.03], "fits"),
        ([2.5, 1.9, 1.7], [2.6, 2.02, 2.0], "fits"),
        # Both losses are above the best model's.
        ([2.5, 2.3, 2.2], [2.6, 2.4, 2.39], "underfits"),
        # The validation loss still fell by 5 % in the last epoch.
        ([2.5, 1.9, 1.7], [2.6, 2.1, 2.0], "underfits"),
        # There was only one epoch.
        ([1.9], [2.0], "underfits"),
        # Both losses are above the best model's, but the validation loss already rose again.
        ([2.5, 2.3, 2.2], [2.6, 2.4, 2.5], "overfits"),
    ],
)
def test_verdicts(train, validation, name):
    best = example.Curves([2.5, 1.8], [2.5, 2.0])
    assert example.verdict(example.Curves(train, validation), best) == name


def test_a_text_learnt_by_heart_is_overfitted_and_one_hardly_read_underfitted():
    """Random letters cannot be learnt, only memorised."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(8, (3000,), generator=generator)
    text = example.Text("abcdefgh", noise[:200], noise[2000:])
    curves = trained(text, epochs=60, learning_rate=1e-2, width=64, decay_rate=0.01)[1]
    assert example.verdict(curves, curves) == "overfits"
    assert curves.train[-1] < 1.6 < math.log(8) < curves.validation[-1]
    assert curves.best_epoch < 10

    english = example.split(BOOK, 2000)
    best = trained(english, epochs=8)[1]
    for slow in ({"learning_rate": 1e-4}, {"epochs": 1}):
        assert example.verdict(trained(english, **slow)[1], best) == "underfits"


# ---- decoding ------------------------------------------------------------------------------------


def test_distinct_shares():
    # The five 4-grams are abcd, bcda, cdab, dabc and abcd again.
    assert example.distinct_share("abcdabcd") == 4 / 5
    assert example.distinct_share("aaaaaaaa") == 1 / 5
    assert example.mean_distinct_share(["abcdabcd", "aaaaaaaa"]) == pytest.approx(0.5)


def test_a_text_continues_what_the_model_can_see(text, model):
    """The text equals that of a loop that gives the model only the last CONTEXT tokens."""
    prompt = "The quick brown fox "
    assert len(prompt) > CONTEXT
    ids = text.encode(prompt)
    for _ in range(30):
        ids.append(int(model(torch.tensor([ids[-CONTEXT:]]))[0, -1].argmax()))
    greedy = SamplingParams(temperature=0)
    got = example.sample_texts(model, text, prompt, greedy, 30)
    assert prompt + got[0] == text.decode(ids)
    _, seen = example.windowed(model)(torch.tensor([ids]), None)
    assert seen.tolist() == [ids[-CONTEXT:]]


def test_decoding_is_tuned_to_the_author(text, model, monkeypatch):
    asked, sample_texts = [], example.sample_texts

    def recorded(*args, **options):
        asked.append(example.mean_distinct_share(sample_texts(*args, **options)))
        return sample_texts(*args, **options)

    monkeypatch.setattr(example, "sample_texts", recorded)
    params, share, author = example.tune_decoding(model, text, "The ", length=60, trials=5, seed=5)
    book = text.decode(text.validation.tolist())
    pieces = [book[i : i + 60] for i in range(0, len(book) - 59, 60)]
    assert author == pytest.approx(example.mean_distinct_share(pieces))
    away = [abs(one - author) for one in asked]
    assert abs(share - author) == min(away) < max(away)
    found = sample_texts(model, text, "The ", params, 60, n=example.DECODING_ROWS)
    assert example.mean_distinct_share(found) == share


def test_columns_are_wrapped_side_by_side():
    got = example.side_by_side(["one", "two"], ["a " * 30, "b\n\nc"])
    width = example.COLUMN
    assert got.split("\n") == [
        f"{'one':{width}} | two",
        f"{'-' * width} | {'-' * width}",
        f"{('a ' * 19).strip():{width}} | b",
        f"{('a ' * 11).strip():{width}} |",
        f"{'':{width}} | c",
    ]


# ---- the command ---------------------------------------------------------------------------------


TINY = [
    *("--characters", "600", "--context", "16", "--max-epochs", "2", "--max-layers", "1"),
    *("--max-width", "32", "--keep", "2", "--length", "40", "--decoding-trials", "2"),
]


@pytest.fixture
def run(tmp_path, capsys):
    """Return a function that runs the command with a tiny budget and returns its stdout."""

    def run(*options):
        example.main([*TINY, "--out", str(tmp_path / "out"), *options])
        return capsys.readouterr().out

    return run


def trial_lines(stdout):
    return stdout.split("\n\n")[0].split("\n")[1:]


def test_the_command_reports_every_trial_and_keeps_the_best_models(run, tmp_path):
    stdout = run("--trials", "4")
    lines = trial_lines(stdout)
    assert [int(line.split()[0]) for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert line.split()[-1] in ("underfits", "overfits", "fits", "pruned")

    out = tmp_path / "out"
    assert len(list((out / "trials").glob("*.json"))) == 4
    assert len(list((out / "trials").glob("*.pt"))) == 2
    samples = (out / "samples.md").read_text(encoding="utf-8")
    assert samples in stdout
    assert samples.count("Alice was ") == 4  # two models, greedy and tuned

    validation = sorted(float(line.split()[10]) for line in lines)
    assert [f"validation {loss:.3f}" in samples for loss in validation] == [True, True] + [
        False
    ] * 2


def test_a_kept_model_has_the_loss_that_was_recorded(run, tmp_path):
    run("--trials", "3")
    text = example.split(example.read_book(), 600)
    setup = example.Setup(text, 16, 0, tmp_path / "out")
    kept = 0
    for record in (tmp_path / "out" / "trials").glob("*.json"):
        content = json.loads(record.read_text(encoding="utf-8"))
        assert setup.file(content["values"], "json") == record
        if record.with_suffix(".pt").exists():
            kept += 1
            model = setup.model(content["values"])
            loss = example.loss_on(model, text.validation)
            assert loss == pytest.approx(content["validation"][-1], rel=1e-6)
    assert kept == 2


def test_the_pictures_are_drawn(run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'tune'")
    stdout = run("--trials", "3")
    for name in ("curves.png", "trials.png"):
        file = tmp_path / "out" / name
        assert file.read_bytes().startswith(b"\x89PNG")
        assert str(file) in stdout


def test_the_panels_are_the_extremes():
    def tried(number, train, validation, state="complete"):
        return example.Tried(number, state, {}, 0, example.Curves(train, validation))

    trials = [
        tried(0, [2.5, 2.4], [2.6, 2.5]),
        tried(1, [2.9, 2.8], [2.9, 2.85]),
        tried(2, [1.5, 1.0], [2.2, 2.4]),
        tried(3, [1.5, 1.1], [2.2, 2.3]),
        tried(4, [2.1, 1.7], [2.1, 2.09]),
        tried(5, [3.0], [3.1], "pruned"),
    ]
    assert example.verdicts(trials) == [
        "underfits",
        "underfits",
        "overfits",
        "overfits",
        "fits",
        "pruned",
    ]
    chosen = example.selected(trials)
    assert {title: x.number for title, x in chosen.items()} == {
        "best": 4,
        "most underfitted": 1,
        "most overfitted": 2,
    }


def test_a_resumed_search_keeps_its_finished_trials(run, tmp_path, monkeypatch):
    storage = ("--storage", f"sqlite:///{tmp_path / 'search.db'}")
    train, trainings = example.train, []

    def killed_in_the_third(model, text, values, generator, curves):
        trainings.append(values)
        for loss in train(model, text, values, generator, curves):
            yield loss
            if len(trainings) == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(example, "train", killed_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            run("--trials", "4", *storage)
    records = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.pt")}
    assert len(records) == 2

    def counted(model, text, values, generator, curves):
        trainings.append(values)
        return train(model, text, values, generator, curves)

    monkeypatch.setattr(example, "train", counted)
    resumed = run("--trials", "4", "--keep", "4", *storage)
    assert len(trainings) == 5  # 3 in the first run; trials 3 and 4 in the second
    assert trainings[2] == trainings[3]
    assert (
        records.items()
        <= {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.pt")}.items()
    )

    monkeypatch.setattr(example, "train", train)
    other = tmp_path / "other"
    at_once = run("--trials", "4", "--keep", "4", "--out", str(other))
    without_numbers = [[line.split()[1:] for line in trial_lines(x)] for x in (resumed, at_once)]
    assert without_numbers[0] == without_numbers[1]


def test_a_grid_has_every_combination(run):
    lines = trial_lines(run("--method", "grid"))
    # Columns 5 and 6 are the learning rate and the decay.
    rows = {tuple(line.split()[i] for i in (5, 6)) for line in lines}
    assert len(rows) == len(lines) == 2 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--characters", "32"], "--characters must be in 33 .. 128797, got 32"),
        (["--keep", "0"], "--keep must be in 1 .. inf, got 0"),
        (["--prompt", "Ünder"], "--prompt must have characters of the book, got 'Ü'"),
    ],
)
def test_bad_options_are_refused(run, capsys, options, message):
    with pytest.raises(SystemExit):
        run(*options)
    assert message in capsys.readouterr().err

"""analyze on a run: against an evaluation and plain loops over the model's routings, on two ranks, of other folders."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.harness import Ended, command, contents, end_two, records, start_two, tiny_config, write_text
from tests.interop.models import make_checkpoint
from titan_moe.checkpoint import load_model
from titan_moe.convert.hf.convert import to_hf
from titan_moe.data.tokenizer import load_tokenizer

SEQ, L, E, K = 16, 2, 4, 2
STEPS = (2, 4, 6)
FILES = ["analysis.json", "analysis.md", "report.html"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps with three checkpoints, validated on 4 batches of 8 sequences; its data beside it."""
    folder = tmp_path_factory.mktemp("analyze")
    changes = {
        "data.path": [str(write_text(folder / "text.jsonl"))],
        "data.cache_folder": str(folder / "cache"),
        "validation.freq": 6,
        "validation.steps": 4,
        "moe.top_k": K,
    }
    config = tiny_config(folder / "config.toml", changes)
    ended = command("train", ["--job.config_file", str(config), "--job.dump_folder", str(folder / "run")])
    assert ended.code == 0, ended.err
    return folder / "run"


def analyze(*words: object) -> Ended:
    return command("analyze.cli", [str(word) for word in words])


def analysis(out: Path, *words: object) -> dict[str, Any]:
    ended = analyze("--out", out, *words)
    assert ended.code == 0, ended.err
    return json.loads((out / "analysis.json").read_text())


def assert_alike(first: Any, second: Any, place: str = "") -> None:
    """Equal names, counts and texts; numbers up to the rounding of sums in another order."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_alike(first[key], second[key], f"{place}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), place
        for i, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_alike(one, other, f"{place}[{i}]")
    elif isinstance(first, float):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-6), place
    else:
        assert first == second, place


def test_it_is_of_the_tokens_of_an_evaluation(run: Path, tmp_path: Path) -> None:
    """Loads to the last count as the run's validation wrote them; the run itself is left as it was."""
    before = contents(run)
    found = analysis(tmp_path, "--checkpoint", run)
    expected = records(run, "validation")[-1]
    assert found["checkpoint"]["step"] == 6
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["num_tokens"] == expected["num_tokens"] == 4 * 8 * SEQ
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    for i, layer in enumerate(found["layers"]):
        assert layer["load"] == [expected[f"load/layer_{i}/expert_{e}"] for e in range(E)]
        assert layer["maxvio"] == pytest.approx(expected[f"maxvio_global/layer_{i}"], rel=1e-5)
        for key in ("load_by_text", "load_by_class", "load_by_position"):
            assert [sum(column) for column in zip(*layer[key], strict=True)] == layer["load"], key
        assert sum(layer["margin"]["histogram"]) == sum(layer["entropy"]["histogram"]) == found["num_tokens"]
    assert found["over_training"] is None
    assert not any(layer["overlapping_pairs"] for layer in found["layers"])
    for layer in analysis(tmp_path / "all", "--checkpoint", run, "--overlap_cosine", 0)["layers"]:
        cosines = {(i, j): layer["output_similarity"][i][j] for i in range(E) for j in range(i + 1, E)}
        wanted = sorted((pair for pair in cosines if cosines[pair] >= 0), key=lambda pair: -cosines[pair])
        assert [tuple(pair["experts"]) for pair in layer["overlapping_pairs"]] == wanted
        assert [pair["output_cosine"] for pair in layer["overlapping_pairs"]] == [cosines[pair] for pair in wanted]
    assert contents(run) == before
    assert (tmp_path / "analysis.md").read_text().startswith("# run, step 6\n")
    assert "run, step 6" in (tmp_path / "report.html").read_text()
    assert not [
        path for path in tmp_path.iterdir() if path.name not in ("all", "analysis.json", "analysis.md", "report.html")
    ]


def test_numbers_of_a_text_are_those_of_its_tokens(run: Path, tmp_path: Path) -> None:
    """One file in its whole, by hand: windows of tokens through the model, counted in plain Python."""
    text = "the cat sat on 7 mats, the dog ran. " * 40
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n")
    found = analysis(tmp_path / "out", "--checkpoint", run, "--data.path", file, "--min_count", 2)
    tokenizer = load_tokenizer(str(run / "checkpoint" / "step-6" / "tokenizer.json"))
    ids = [*tokenizer.encode(text), tokenizer.eot_id]
    tokens = torch.tensor(ids[: (len(ids) - 1) // SEQ * SEQ]).view(-1, SEQ)
    model, _ = load_model(run)
    with torch.no_grad():
        _, routings = model(tokens, want="routings")
    T = tokens.numel()
    flat = tokens.flatten().tolist()
    for layer, routing in zip(found["layers"], routings, strict=True):
        choices = routing.topk_experts.tolist()
        both = sum({0, 1} <= set(experts) for experts in choices)
        load = [sum(e in experts for experts in choices) for e in range(E)]
        assert layer["load"] == load
        assert layer["coactivation"]["counts"][0][1] == both
        assert layer["coactivation"]["lift"][0][1] == pytest.approx(both * T / load[0] / load[1], rel=1e-5)
        assert layer["coactivation"]["lift"][0][0] is None
        for e in range(E):
            for top in layer["top_tokens"][e]:
                assert top["count"] == sum(e in x and t == top["token"] for x, t in zip(choices, flat, strict=True))
                assert top["total"] == flat.count(top["token"])
                assert top["pmi"] == pytest.approx(math.log(top["count"] * T / load[e] / top["total"]), rel=1e-5)
                assert top["contexts"]
                for context in top["contexts"]:
                    assert context["before"] + context["token"] + context["after"] in text
    (sample,) = found["sample"]["texts"]
    shown = {"".join(sequence["tokens"]): sequence for sequence in sample["sequences"]}
    assert len(sample["sequences"]) == len(tokens)
    for b, row in enumerate(tokens.tolist()):
        sequence = shown[text[b * SEQ : (b + 1) * SEQ]]
        assert sequence["ids"] == row
        for i, routing in enumerate(routings):
            for s in range(SEQ):
                assert sorted(sequence["experts"][i][s]) == sorted(routing.topk_experts[b * SEQ + s].tolist())
    assert found["pruning"]["curve"][0] == {"removed": 0, "loss": found["pruning"]["loss"]}
    assert [point["removed"] for point in found["pruning"]["curve"]] == [0, 1, 2]
    assert len(found["pruning"]["single"]) == L


def test_texts_have_names_and_add_up(run: Path, tmp_path: Path) -> None:
    first, second = write_text(tmp_path / "first.jsonl", 10), write_text(tmp_path / "second.jsonl", 20)
    at = ["--checkpoint", run]
    both = analysis(tmp_path / "both", *at, "--data.path", first, f"other={second}", f"other={first}")
    assert [text["name"] for text in both["texts"]] == ["first", "other"]
    assert both["texts"][1]["files"] == [str(second), str(first)]
    alone = analysis(tmp_path / "alone", *at, f"--data.path={first}")
    assert alone["layers"][0]["load"] == both["layers"][0]["load_by_text"][0]
    assert alone["loss"] == both["texts"][0]["loss"]
    assert sum(text["num_tokens"] for text in both["texts"]) == both["num_tokens"]
    short = analysis(tmp_path / "short", *at, "--data.path", first, "--validation.steps", 1, "--training.seq_len", 8)
    assert short["num_tokens"] == 8 * 8
    assert [bucket["last"] for bucket in short["position_buckets"]] == [0, 1, 3, 7]


def test_several_checkpoints_are_over_training(run: Path, tmp_path: Path) -> None:
    """Each row is what the checkpoint alone gives; the drift is that of the choices of the same tokens."""
    found = analysis(tmp_path / "all", "--checkpoint", run, "--all_steps")
    over = found["over_training"]
    assert [one["step"] for one in over["checkpoints"]] == list(STEPS)
    choices = []
    for i, step in enumerate(STEPS):
        folder = run / "checkpoint" / f"step-{step}"
        one = analysis(tmp_path / f"step-{step}", "--checkpoint", folder)
        assert one["loss"] == over["loss"][i]
        assert [layer["load"] for layer in one["layers"]] == over["load"][i]
        assert [layer["specialisation"]["mean"] for layer in one["layers"]] == over["measures"]["specialisation"][i]
        assert [layer["margin"]["mean"] for layer in one["layers"]] == over["measures"]["margin"][i]
        (sample,) = one["sample"]["texts"]
        experts = [torch.tensor(sequence["experts"]) for sequence in sample["sequences"]]
        choices.append(torch.cat(experts, dim=1).sort(-1).values)  # (L, T, K)
    assert choices[0].shape[1] == over["drift"]["num_tokens"] == found["num_tokens"]
    for i, (before, after) in enumerate(pairwise(choices)):
        changed = (before != after).any(-1).double().mean(-1)
        assert over["drift"]["changed"][i] == pytest.approx(changed.tolist(), rel=1e-5)
    assert over["drift"]["agreement_with_last"][-1] == [1] * L
    last = analysis(tmp_path / "last", "--checkpoint", run)
    assert_alike({**found, "over_training": None}, last)
    two = [word for step in STEPS[:2] for word in ("--checkpoint", run / "checkpoint" / f"step-{step}")]
    assert len(analysis(tmp_path / "two", *two)["over_training"]["checkpoints"]) == 2


def test_two_ranks_give_what_one_process_gives(run: Path, tmp_path: Path) -> None:
    """Each reads its share of the sequences; an odd number of batches leaves one of them without any in the end."""
    file = write_text(tmp_path / "text.jsonl", 20)
    words = ["--checkpoint", run, "--all_steps", "--data.path", f"a={file}", f"b={run.parent / 'text.jsonl'}"]
    words = [*map(str, words), "--validation.steps", "5", "--piece_tokens", "8"]
    one = analysis(tmp_path / "one", *words)
    commands = start_two([*words, "--out", str(tmp_path / "two")], tmp_path / "log", verb="analyze.cli")
    assert end_two(commands) == [0, 0], commands[0].written(".err")
    assert_alike(one, json.loads((tmp_path / "two" / "analysis.json").read_text()))
    assert commands[1].written(".out") == ""


def test_a_hugging_face_folder_is_the_checkpoint_that_it_came_from(tmp_path: Path) -> None:
    """The same numbers as of the checkpoint; nothing but the result is left."""
    step = make_checkpoint(tmp_path / "run", **{"router.name": "sigmoid"})
    to_hf(step, tmp_path / "hf", verify=False)
    before = contents(tmp_path / "hf")
    file = write_text(tmp_path / "text.jsonl", 20)
    words = ["--data.path", file, "--data.cache_folder", tmp_path / "cache", "--training.seq_len", 32]
    ours = analysis(tmp_path / "ours", "--checkpoint", step, *words)
    theirs = analysis(tmp_path / "theirs", "--checkpoint", tmp_path / "hf", *words)
    assert theirs.pop("checkpoint") == {"path": str(tmp_path / "hf"), "step": 0, "name": "hf"}
    del ours["checkpoint"]
    assert_alike(ours, theirs)
    assert contents(tmp_path / "hf") == before
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == [
        "analysis.json",
        "analysis.md",
        "report.html",
    ]
    ended = analyze("--checkpoint", tmp_path / "hf", *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "--out is needed" in ended.err


def test_experts_that_choose_are_analyzed_without_pruning(tmp_path: Path) -> None:
    step = make_checkpoint(tmp_path / "run", **{"router.name": "expert_choice"})
    file = write_text(tmp_path / "text.jsonl", 20)
    words = ["--data.path", file, "--data.cache_folder", tmp_path / "cache", "--training.seq_len", 32]
    found = analysis(tmp_path / "out", "--checkpoint", step, *words)
    assert found["pruning"] is None
    assert found["layers"][0]["maxvio"] < 0.1
    assert found["layers"][0]["margin"]["negative_share"] > 0


def test_one_layer_of_experts_of_which_a_token_takes_one(tmp_path: Path) -> None:
    """No pairs in a layer, none between layers; and none to choose where there is one expert."""
    file = write_text(tmp_path / "text.jsonl", 20)
    words = ["--data.path", file, "--data.cache_folder", tmp_path / "cache", "--training.seq_len", 32]
    switch = {"router.name": "switch", "moe.top_k": 1, "model.num_layers": 1}
    step = make_checkpoint(tmp_path / "one", **switch)
    found = analysis(tmp_path / "out", "--checkpoint", step, *words)
    assert found["between_layers"] == []
    assert {value for row in found["layers"][0]["coactivation"]["lift"] for value in row} == {None}
    step = make_checkpoint(tmp_path / "alone", **switch, **{"moe.num_experts": 1})
    (layer,) = analysis(tmp_path / "out", "--checkpoint", step, *words)["layers"]
    assert (layer["margin"], layer["maxvio"], layer["share"]) == (None, 0, [1])
    reason = "every token has every expert, so that there is none to compare a choice with"
    assert layer["margin_missing"] == reason
    for name in ("analysis.md", "report.html"):
        assert f"No margin in layer 0: {reason}." in (tmp_path / "out" / name).read_text()
    assert layer["specialisation"]["mean"] == pytest.approx(0, abs=1e-9)
    assert layer["entropy"]["mean"] == 0


def test_unused_slots_are_counted_by_layer(tmp_path: Path) -> None:
    """By a plain loop over the routings of the same tokens, of a router that leaves some slots empty."""
    step = make_checkpoint(tmp_path / "run", **{"router.name": "threshold", "router.max_k": 3})
    file = write_text(tmp_path / "text.jsonl", 20)
    words = ["--data.path", file, "--data.cache_folder", tmp_path / "cache", "--training.seq_len", 32]
    found = analysis(tmp_path / "out", "--checkpoint", step, *words)
    model, _ = load_model(step)
    tokens = torch.tensor([one["ids"] for text in found["sample"]["texts"] for one in text["sequences"]])
    with torch.no_grad():
        _, routings = model(tokens, want="routings")
    assert tokens.numel() == found["num_tokens"]
    for layer, routing in zip(found["layers"], routings, strict=True):
        experts = [[e for e in row if e < 8] for row in routing.topk_experts.tolist()]
        assert layer["unused_slots"] == sum(3 - len(row) for row in experts)
        assert layer["unrouted_tokens"] == sum(not row for row in experts)
        assert layer["choices_per_token"] == pytest.approx(sum(map(len, experts)) / tokens.numel(), rel=1e-5)
    assert any(layer["unused_slots"] for layer in found["layers"])


def test_identity_experts_are_the_last_and_have_no_weights(tmp_path: Path) -> None:
    file = write_text(tmp_path / "text.jsonl", 20)
    words = ["--data.path", file, "--data.cache_folder", tmp_path / "cache", "--training.seq_len", 32]
    step = make_checkpoint(tmp_path / "run", **{"moe.num_identity_experts": 2})
    found = analysis(tmp_path / "out", "--checkpoint", step, *words)
    assert (found["model"]["num_experts"], found["model"]["num_identity_experts"]) == (10, 2)
    for layer in found["layers"]:
        assert len(layer["load"]) == len(layer["output_similarity"]) == 10
        assert layer["output_similarity"][8][9] == 1  # both answer with the token
        assert layer["weight_similarity"][0][1] is not None
        assert layer["weight_similarity"][8] == [None] * 10
        assert [pair["experts"] for pair in layer["overlapping_pairs"]] == [[8, 9]]
    assert found["scalars"]["weight_similarity"] is not None


def test_parts_that_are_not_asked_for_are_left_out(run: Path, tmp_path: Path) -> None:
    found = analysis(
        tmp_path / "out", "--checkpoint", run, "--ablation_tokens", 0, "--output_tokens", 0, "--top_tokens", 0
    )
    assert found["pruning"] is None
    assert found["scalars"]["output_similarity"] is None
    for layer in found["layers"]:
        assert (layer["output_similarity"], layer["overlapping_pairs"]) == (None, [])
        assert layer["top_tokens"] == [[]] * E
    ended = analyze("--checkpoint", run, "--kept_tokens", 1, "--sample_tokens", 20)
    assert ended.code == 0
    found = json.loads((run / "analysis" / "analysis.json").read_text())  # where it goes without --out
    assert [len(one["tokens"]) for one in found["sample"]["texts"][0]["sequences"]] == [16, 4]


def test_bad_input(run: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", **{"moe.num_experts": 0})
    other = make_checkpoint(tmp_path / "other")
    short = tmp_path / "short.txt"
    short.write_text("short")
    (tmp_path / "file").write_text("")
    at, text = ["--checkpoint", run], run.parent / "text.jsonl"
    cache = ["--data.path", text, "--data.cache_folder", tmp_path / "cache"]
    cases: dict[str, tuple[list[object], str]] = {
        "no checkpoint": ([], "arguments are required: --checkpoint"),
        "no such folder": (["--checkpoint", run / "nowhere"], "nowhere: no such folder"),
        "nothing inside": (["--checkpoint", run.parent / "cache"], "no complete step-N folder"),
        "no steps inside": (["--checkpoint", run.parent / "cache", "--all_steps"], "no complete step-N folder"),
        "dense": (["--checkpoint", dense, *cache], "of a dense model"),
        "another model": ([*at, "--checkpoint", other, *cache], "has other moe.num_experts"),
        "two of one name": ([*at, "--data.path", text, text], "two texts are called text"),
        "no such file": ([*at, "--data.path", "a=nowhere.txt"], "nowhere.txt"),
        "too short": ([*at, "--data.path", short], "is longer than the data of data.path"),
        "of the model": ([*at, "--model.dim", 64], "--model.dim changes nothing here"),
        "unknown": ([*at, "--dead_faction", 0.5], "dead_faction"),
        "above one": ([*at, "--dead_fraction", 1.5], "--dead_fraction (1.5) must be from 0 to 1"),
        "nan": ([*at, "--rare_share", "nan"], "--rare_share (nan) must be from 0 to 1"),
        "negative": ([*at, "--top_tokens", -1], "--top_tokens (-1) must be at least 0"),
        "no passes": ([*at, "--ablation_passes", 0], "--ablation_passes (0) must be at least 1"),
        "no number": ([*at, "--min_count", "few"], "--min_count"),
        "two after a flag": ([*at, run], f"give the flag again for each: --checkpoint {run} --checkpoint {run}"),
        "no text": ([*at, "--data.path", "a="], "--data.path a=: names no file: write NAME=F, or F alone"),
        "no name": ([*at, "--data.path", f"={text}"], "has no name before the =: write NAME=F, or F alone"),
        "a file": ([*at, "--out", tmp_path / "file"], "file is not writable: Not a directory"),
    }
    for name, (words, part) in cases.items():
        ended = analyze(*words) if "--out" in words else analyze("--out", tmp_path / "out", *words)
        assert (ended.code, ended.out) == (2, ""), name
        line = ended.err.splitlines()[-1]
        assert line.startswith("error: "), name
        assert part in line, (name, line)
        assert "Traceback" not in ended.err
    assert not (tmp_path / "out" / "analysis.json").exists()
    assert analyze("--checkpoint", run / "nowhere").code == 2
    assert not (run / "nowhere").exists()


def test_a_missing_package_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_moe.analyze.cli.find_spec", lambda name: None if name == "jinja2" else name)
    ended = analyze("--checkpoint", run)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: the report of an analysis needs jinja2: pip install 'titan_moe[study]'\n"

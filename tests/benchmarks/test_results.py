"""Result files, the tables made from them, and the learning-rate search."""

import json

import pytest

from tests.benchmarks import demos, methods, overlap, results
from tests.benchmarks.methods import Runs, add_gaps, row


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1327104, "1,327,104"),
        (1234.5, "1,234"),
        (270.4, "270"),
        (41.72, "41.7"),
        (2.534, "2.53"),
        (0.7371, ".737"),
        (-0.05, "-.050"),
        ([0.66401, 0.0149], ".664 ± .015"),
        ("a text", "a text"),
        (None, ""),
    ],
)
def test_cells(value, text):
    assert results.cell(value) == text


def test_a_document_gets_the_table_of_the_file_and_where_it_is_from(folder, capsys):
    rows = [{"a": 1, "b": 0.5}, {"a": "x", "c": 20.0}]
    results.save("some", rows, examples={"training": 9000}, seeds=[1, 2], texts={"A poem": "O!"})
    table = "| a | b | c |\n| --- | --- | --- |\n| 1 | .500 |  |\n| x |  | 20.0 |"
    assert capsys.readouterr().out == f"{table}\n"
    saved = json.loads((folder / "some.json").read_text())
    assert saved["rows"] == rows
    document = "# T\n\n<!-- docs/results/some.json -->\nold\n<!-- end -->\n\nmore\n"
    text = results.filled(document)
    assert results.filled(text) == text
    _, begin, *parts, end = text.split("\n\n")
    assert begin == f"<!-- docs/results/some.json -->\n{table}"
    caption = parts[0].replace("\n", " ")
    assert saved["about"]["commit"] in caption
    assert "examples: 9,000 training; mean ± standard deviation over 2 seeds." in caption
    assert parts[1:] == ["A poem:", "```text\nO!\n```\n<!-- end -->"]
    assert end == "more\n"


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1e-3, [3e-4, 1e-3, 3e-3, 1e-2]),
        (3e-4, [3e-4, 1e-3, 3e-3, 1e-2, 1e-4]),
        (3e-2, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
    ],
)
def test_the_best_rate_is_inside_of_what_was_tried_and_runs_are_kept(
    folder, monkeypatch, best, tried
):
    made = []

    def one_run(data, method, lr, seed):
        made.append(lr)
        return {"validation accuracy": 0.6 - abs(lr - best), "parameters": 5}

    class Data:
        task = "paraphrase"

    monkeypatch.setattr(methods, "one_run", one_run)
    for _ in range(2):
        runs = Runs("some", Data())
        assert runs.best_rate("LoRA, rank 4") == best
        assert runs.get("LoRA, rank 4", best, methods.SEARCH_SEED)["parameters"] == 5
    assert made == tried


def test_rows_have_means_deviations_and_their_distance_from_the_best():
    runs = [{"parameters": 5, "seconds": 1.0, "dev accuracy": value} for value in (0.5, 0.7)]
    better = [{"parameters": 7, "seconds": 1.0, "dev accuracy": value} for value in (0.8, 0.9)]
    rows = [row("one", 1e-3, runs), row("other", 3e-3, better)]
    full = [row(methods.FULL, 1e-4, better)]
    assert add_gaps(rows + full, "dev accuracy", 2, max) is rows[1]
    assert rows[0] == {
        "method": "one",
        "parameters": 5,
        "lr": "0.001",
        "dev accuracy": [pytest.approx(0.6), pytest.approx(0.1414, abs=1e-4)],
        "gap to the best adapter": "2.2 s.e.",  # 0.25 / (0.1 ** 2 + 0.05 ** 2) ** 0.5
    }
    assert rows[1]["gap to the best adapter"] == ""
    better[0]["dev accuracy"] = 0.9
    full = [row(methods.FULL, 1e-4, better)]
    add_gaps(rows + full, "dev accuracy", 2, max)
    assert full[0]["gap to the best adapter"] == "1.0 s.e. ahead"  # 0.05 / (0.05 ** 2) ** 0.5


def test_what_is_shared_is_counted():
    assert overlap.features("How do bees fly?", "how do birds fly") == [3, 1, 0.6, 0.75, 0.75]
    (row_of_overlap,) = demos.without_model()
    assert row_of_overlap["result"] == 'dev accuracy .799 (always "no": .625)'

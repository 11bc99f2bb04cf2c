"""The pages and pictures that show a run."""

import io
import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from data.sonnets import Sonnet
from finetune import report
from tests.conftest import ROOT

HOSTILE = "Is </script><img src=x onerror=alert(1)> & \"this\" 'safe'?"
VOID = {"meta", "input"}
LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.1, "targets": ("query", "value"), "layers": None}
REFT = {"type": "loreft", "rank": 4, "alpha": 16.0, "dropout": 0.0, "activation": "linear"}
REFT |= {"locations": ("attention",), "layers": (0, 3), "positions": "f2+l2"}


def make_record(task: str, **changes) -> dict:
    """A run of three epochs, the second of which is the best."""
    flags = {"epochs": 3, "lr": 1e-4, "batch_size": 12, "lr_schedule": "constant", "seed": 11711}
    flags |= {"warmup_ratio": 0.0, "weight_decay": 0.01, "limit_train": None, "note": HOSTILE}
    flags |= {"para_train": "data/quora-train.csv", "sonnet_path": "data/sonnets.txt"}
    names = ["train_loss", "dev_loss", "dev_accuracy", "dev_macro_f1"]
    final = {"dev_accuracy": 0.75, "dev_macro_f1": 0.5, "dev_loss": 0.55}
    if task == "sonnet":
        names = ["train_loss", "val_loss", "dev_loss", "dev_chrf"]
        form = {"share_of_14_lines": 1.0, "syllables_per_line": 9.63, "rhyming_pairs": 0.25}
        form |= {"longest_copied_run": 7}
        final = {"val_loss": 4.5, "dev_loss": 4.4, "dev_chrf": 41.7} | form
        final |= {"val_loss_before_training": 4.73, "shakespeare": form | {"rhyming_pairs": 0.9}}
    values = ([0.7, 0.65, 0.6, 0.5], [0.5, 0.55, 0.75, 0.5], [0.4, 0.6, 0.7, 0.4])
    history = [
        {"epoch": i, **dict(zip(names, row, strict=True)), "is_best": i < 3}
        for i, row in enumerate(values, 1)
    ]
    record = {"name": f"lora-gpt2-3-0.0001-8-{task}-abc123", "method": "lora", "task": task}
    record |= {"model": "gpt2", "date": "2025-01-31T12:30:00+01:00", "device": "cpu"}
    record |= {"trainable_parameters": 1327104, "total_parameters": 125766912, "processes": 1}
    record |= {"train_seconds": 64.2, "peak_memory_mb": 402.3, "versions": {"torch": "2"}}
    decoding = {"top_p": 0.9, "temperature": 1.2, "greedy": False}
    record |= {"predicted_with": decoding if task == "sonnet" else {}, "revision": None}
    return (
        record | {"arguments": flags, "adapter": LORA, "history": history, "final": final} | changes
    )


def make_rows(n: int = 1) -> list[dict]:
    """n times a wrong pair and three right ones, one of them a paraphrase."""
    row = {"id": "7 a", "first": HOSTILE, "second": "Que será?", "label": "no", "predicted": "yes"}
    row |= {"probability": 0.9512}
    no, yes = row | {"predicted": "no"}, row | {"label": "yes"}
    return [row, no, no, yes] * n


def make_poems() -> list[tuple[Sonnet, Sonnet]]:
    given = tuple(f"Given line {i}" for i in range(3))
    written = [
        Sonnet(132, given + tuple(f"{who} line {i}" for i in range(3, n)))
        for who, n in (("<b>Model</b>", 12), ("Poet", 14))
    ]
    return [tuple(written)]


class Page(HTMLParser):
    """A parsed page; raises AssertionError where elements are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(text for _, text in self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all_in(self, tag: str) -> list[str]:
        """The texts that stand directly in elements of a kind."""
        return [text for parent, text in self.texts if parent == tag]


@pytest.fixture(params=["paraphrase", "sonnet"])
def page(request) -> Page:
    record = make_record(request.param)
    if request.param == "paraphrase":
        return Page(report.paraphrase_report(record, make_rows()))
    return Page(report.sonnet_report(record, make_poems()))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_a_page_needs_no_other_file_and_no_network(page):
    assert not {"link", "img", "iframe", "object", "base", "a"} & set(page.tags)
    values = [(name, value or "") for name, value in page.attributes]
    assert [value for _, value in values if "//" in value] == []
    links = [value for name, value in values if name.split(":")[-1] in ("src", "href")]
    assert links
    assert all(link.startswith("#") for link in links)  # within the drawings
    assert not any("url(" in text or "@import" in text for text in page.all_in("style"))
    policy = dict(page.attributes)["content"]
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_fragments_lead_to_one(page):
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = {v[1:] for k, v in page.attributes if k == "xlink:href"}
    wanted |= {v[5:-1] for _, v in page.attributes if v and v.startswith("url(#")}
    assert wanted <= set(ids)


def test_texts_are_shown_and_not_interpreted(page):
    assert HOSTILE in page.all_in("dd")
    assert "img" not in page.tags
    assert "onerror" not in {name for name, _ in page.attributes}


def test_curves_are_described_and_have_the_colors_of_the_page(page):
    assert page.tags.count("svg") == 2
    styles = " ".join(value for name, value in page.attributes if name == "style")
    assert "var(--best)" in styles
    assert "currentColor" in styles
    assert not any(color in styles for color in report.PAGE_COLORS)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(labels) == 2
    assert all(label.endswith(" by epoch") for label in labels)
    assert "2, best" in page.all_in("th")


def test_the_result_is_said_beside_the_baseline():
    page = Page(report.paraphrase_report(make_record("paraphrase"), make_rows()))
    assert (
        "Dev accuracy 0.750 , macro F1 0.500, at epoch 2 of 3; always answering “no” would score "
        "0.750 on the 4 pairs." in page.text
    )
    assert "answer no answer yes label no 2 67% 1 33% label yes 0 0% 1 100%" in page.text


def test_the_pairs_are_there_whole_and_the_first_are_readable_without_scripts():
    rows = make_rows(50)
    page = Page(report.paraphrase_report(make_record("paraphrase"), rows))
    data = next(text for text in page.all_in("script") if text.startswith("["))
    names = ("first", "second", "label", "predicted", "probability", "id")
    assert [dict(zip(names, pair, strict=True)) for pair in json.loads(data)] == rows
    cells = [text.strip() for text in page.all_in("td") if text.strip()]
    assert cells.count(HOSTILE) == 100
    assert cells.count("0.9512") == 100
    assert page.attributes.count(("class", "wrong")) == 25
    assert page.tags.count("label") == 3


def test_poems_stand_beside_shakespeares_with_their_form():
    page = Page(report.sonnet_report(make_record("sonnet"), make_poems()))
    assert page.text.count("Given line 0 Given line 1 Given line 2") == 1
    assert page.text.count("<b>Model</b> line") == 9
    assert page.text.count("Poet line") == 11
    assert "b" not in page.tags
    assert "12 lines, 5.0 syllables per line, 0% of the pairs rhyme" in page.text
    assert "14 lines, 3.0 syllables per line, 0% of the pairs rhyme" in page.text
    assert "pairs of lines that rhyme 25% 90%" in page.text
    assert "longest run of words copied from a training poem 7 7" in page.text
    assert "Validation loss 4.500 nats per token, 4.730 before training" in page.text


def test_the_settings_are_said_in_words():
    adapter, training, cost = report.describe_run(make_record("paraphrase"))
    assert (
        adapter
        == "LoRA with rank 8, alpha 16, dropout 0.1 on query and value in every block of gpt2."
    )
    assert training == (
        "Trained on quora-train.csv: 3 epochs, batch size 12, learning rate 1e-4 (constant, 0% "
        "warm-up), weight decay 0.01, seed 11711."
    )
    assert cost == (
        "1,327,104 of 125,766,912 parameters trained in 64 s on cpu, peak memory 402 MB."
    )


def test_the_settings_name_an_intervention_a_limit_an_early_stop_and_processes():
    record = make_record("sonnet", adapter=REFT, method="reft", processes=2)
    record["arguments"] |= {"limit_train": 1200, "epochs": 1}
    adapter, training, cost, decoding = report.describe_run(record)
    assert decoding == "Poems shown are sampled at temperature 1.2, top-p 0.9."
    record["predicted_with"]["greedy"] = True
    record["arguments"]["greedy"] = False
    assert report.describe_run(record)[3] == (
        "Poems shown are decoded greedily; the chrF by epoch is of the training run's decoding."
    )
    assert adapter == (
        "ReFT (loreft) with rank 4, alpha 16, dropout 0, activation linear, at prompt "
        "positions f2+l2 after attention in blocks 0 and 3 of gpt2."
    )
    assert "the first 1,200 examples of sonnets.txt: 1 epoch, batch" in training
    assert "on cpu with 2 processes" in cost
    record["arguments"]["epochs"] = 10
    assert report.describe_run(record)[1].endswith(" Training stopped early, after epoch 3.")


def test_an_unfinished_training_and_an_imported_adapter_have_pages_and_pictures_too():
    unfinished = make_record("paraphrase")
    del unfinished["train_seconds"]
    unfinished["history"] = unfinished["history"][1:2]
    page = Page(report.paraphrase_report(unfinished, make_rows()))
    assert "at epoch 2 of 3" in page.text
    assert "Training is unfinished; this is the best epoch so far." in page.text
    for imported in (make_record("paraphrase"), make_record("sonnet")):
        imported["history"] = [{"epoch": 0, "is_best": True}]
        imported["final"].pop("val_loss_before_training", None)
        if imported["task"] == "paraphrase":
            page = Page(report.paraphrase_report(imported, make_rows()))
        else:
            page = Page(report.sonnet_report(imported, make_poems()))
        assert "imported" in page.text
        assert "svg" not in page.tags
        assert imread(io.BytesIO(report.picture(imported))).shape[1] == 800


def test_the_picture_shows_curves_the_best_epoch_and_the_counts(drawn):
    counts = report.confusion_counts(make_rows())
    assert counts.tolist() == [[2, 1], [0, 1]]
    pixels = imread(io.BytesIO(report.picture(make_record("paraphrase"), counts)))
    assert pixels.shape[1] == 800
    assert len(np.unique((pixels * 255).astype(int).reshape(-1, 4), axis=0)) > 20
    losses, scores, matrix = drawn[0].axes
    training, dev, best = (line.get_ydata() for line in losses.lines)
    assert (list(training), list(dev), best[0]) == ([0.7, 0.5, 0.4], [0.65, 0.55, 0.6], 0)
    (star,) = (line for line in scores.lines if line.get_marker() == "*")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([2], [0.75])
    assert losses.get_xlabel() == "epoch; best: 2"
    assert scores.get_xlabel() == "epoch; best: 2 (0.75)"
    assert [text.get_text() for text in scores.legend_.texts] == ["accuracy", "macro F1"]
    assert [text.get_text() for text in matrix.texts] == ["2\n67%", "1\n33%", "0\n0%", "1\n100%"]
    assert drawn[0].get_suptitle() == "gpt2, LoRA, rank 8, learning rate 1e-4, seed 11711"


def test_a_run_of_one_epoch_has_one_tick(drawn):
    record = make_record("sonnet")
    report.picture(record | {"history": record["history"][:1]})
    low, high = drawn[0].axes[0].get_xlim()
    assert [tick for tick in drawn[0].axes[0].get_xticks() if low < tick < high] == [1]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_pictures_are_drawn_whatever_backend_the_environment_names(backend):
    code = "import os, sys; from finetune.report import new_figure\n"
    code += "new_figure().savefig(sys.stdout.buffer, format='png')\n"
    code += "assert 'matplotlib.pyplot' not in sys.modules\n"
    code += f"assert os.environ['MPLBACKEND'] == {backend!r}"
    env = os.environ | {"MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr.decode()
    assert imread(io.BytesIO(done.stdout)).ndim == 3

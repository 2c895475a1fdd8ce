"""Small samples of the real AG News, SQuAD and XSum, where they are at hand; the repository holds none of them."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import raw_data

from expert_merging.data import features
from expert_merging.data.scores import rouge
from expert_merging.data.tasks import get_task

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"
DATA = Path(os.environ.get("CAEM_SHARED_DATA", BESIDE))

pytestmark = pytest.mark.skipif(
    not (DATA / "ag_news").is_dir(),
    reason="no samples of real data: set CAEM_SHARED_DATA to a folder with ag_news, squad and xsum",
)
COUNTS = {"ag_news": (3600, 400, 800), "squad": (655, 199, 199), "xsum": (560, 80, 80)}


@pytest.fixture(scope="module")
def raw():
    paths = SimpleNamespace(
        AG_NEWS_PATH=str(DATA / "ag_news"), SQUAD_PATH=str(DATA / "squad"), XSUM_PATH=str(DATA / "xsum")
    )
    return {name: get_task(name).load(paths) for name in COUNTS}


@pytest.mark.parametrize("name", COUNTS)
def test_every_published_row_is_read(name, raw):
    assert tuple(len(raw[name][split]) for split in features.SPLITS) == COUNTS[name]


def test_ag_news_topics(raw):
    task = get_task("ag_news")
    shares = [sum(task.target(e) == word for e in raw["ag_news"]["test"]) / 800 for word in task.label_words]
    assert all(0.15 < share < 0.35 for share in shares)
    texts = [task.prompt(e) for e in raw["ag_news"]["train"]]
    assert any("\\" in text for text in texts) and not any('""' in text for text in texts)
    baseball = [e for e in raw["ag_news"]["train"] if "baseball" in e["text"].lower()]
    assert sum(task.target(e) == "Sports" for e in baseball) > 0.7 * len(baseball)


def test_squad_answers_stand_in_their_context(raw):
    task = get_task("squad")
    for split in ("train", "validation"):
        assert all(task.target(e) in e["context"] for e in raw["squad"][split])


@pytest.mark.parametrize("name", COUNTS)
def test_targets_score_full_marks_and_other_targets_do_not(name, raw):
    task, examples = get_task(name), raw[name]["test"]
    targets, references = [task.target(e) for e in examples], [task.references(e) for e in examples]
    assert task.score(targets, references)[task.main_score] == pytest.approx(100)
    shifted = targets[1:] + targets[:1]
    assert task.score(shifted, references)[task.main_score] < 50


def test_the_first_words_of_an_article_score_as_lead_baselines_do(raw):
    examples = raw["xsum"]["test"]
    lead = [" ".join(e["document"].split()[:25]) for e in examples]
    scores = rouge(lead, [[e["summary"]] for e in examples])
    assert 10 < scores["rougeL"] < 20 and scores["rouge2"] < scores["rougeL"] < scores["rouge1"]


def test_features_of_real_text(raw, tmp_path):
    from expert_merging.switch.base_model import new_tokenizer

    texts = [e["document"][:500] for e in raw["xsum"]["train"]]
    tokenizer = new_tokenizer(texts, 1000)
    c = raw_data.constants(
        DATA, tmp_path, max_input_length=64, max_decoder_length=32, train_examples=200, test_examples=50
    )
    for name in COUNTS:
        manifest = features.prepare(name, c, tokenizer, raw[name])
        stored = features.load(name, c, tokenizer)
        assert [len(stored[s]) for s in features.SPLITS] == [200, COUNTS[name][1], 50]
        assert manifest["splits"]["train"]["odd"] == 0
        assert max(map(len, stored["train"]["input_ids"])) <= 64 and max(map(len, stored["train"]["labels"])) <= 32
    assert features.load("xsum", c, tokenizer)["train"].num_rows == 200

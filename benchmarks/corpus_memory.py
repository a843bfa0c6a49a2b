"""A corpus larger than the memory allowed: `python benchmarks/corpus_memory.py`.

A process that is refused more than so much memory of its own writes shards that are
larger, checks them, and reads them in the order of training. The operating system
enforces the limit (Linux: RLIMIT_DATA, which counts what a process allocates, but not
the files it maps). Chapter 04 shows the figures.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from llama2_lite.corpus import TokenDataset, write_shards
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import build_town

CONFIG = {
    "documents": 6_000_000,
    "allowed_mib": 128,
    "shard_tokens": 2**23,
    "sequence_length": 1024,
    "batch_size": 16,
}
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "corpus_memory.json"


def status_mib(name: str) -> float:
    """A figure of this process: VmData, what counts, or RssAnon, what is in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def write_and_read(tokenizer_path: str, folder: str) -> dict[str, float]:
    """Do it all under the limit; returns figures in MiB and seconds."""
    town, tokenizer = build_town(), Tokenizer(tokenizer_path)
    limit = int(status_mib("VmData") + CONFIG["allowed_mib"]) * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before, peak = status_mib("RssAnon"), 0.0

    def documents() -> Iterator[str]:
        nonlocal peak
        for number, document in enumerate(town.documents(CONFIG["documents"])):
            yield document.text
            if number % 10_000 == 0:
                peak = max(peak, status_mib("RssAnon") - before)

    start = time.perf_counter()
    write_shards(documents(), tokenizer, folder, shard_tokens=CONFIG["shard_tokens"])
    written = time.perf_counter()
    dataset = TokenDataset(folder, CONFIG["sequence_length"])
    verified = time.perf_counter()
    for step in range(len(dataset) // CONFIG["batch_size"]):
        dataset.batch(step, CONFIG["batch_size"])
        if step % 100 == 0:
            peak = max(peak, status_mib("RssAnon") - before)
    return {
        "text_mib": dataset.n_characters / 2**20,
        "shards_mib": dataset.n_tokens * 2 / 2**20,
        "peak_mib": peak,
        "write_seconds": written - start,
        "verify_seconds": verified - written,
        "read_seconds": time.perf_counter() - verified,
    }


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(write_and_read(sys.argv[1], sys.argv[2])))
        return
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "tokenizer.model"
        texts = (document.text for document in build_town().documents(10_000))
        train_tokenizer(texts, path, 1024)
        command = [sys.executable, __file__, str(path), str(Path(name) / "shards")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results = json.loads(done.stdout)
    print(results, file=sys.stderr)
    write_result(
        OUTPUT,
        config=CONFIG,
        seeds=[0],
        modules=["town", "tokenizer", "corpus"],
        script=__file__,
        results=results,
    )


if __name__ == "__main__":
    main()

"""Meta's own tokenizer on the town: `python benchmarks/meta_compression.py [FILE]`.

Chapter 03 draws its characters per token as a line beside those of tokenizers learnt
from the town. The file is not part of this repository; without it the stored figure
stays.
"""

import sys
from pathlib import Path

from llama2_lite.runtime.artifacts import write_result
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import build_town

CONFIG = {"documents": 20_000, "unseen_documents": 2000}  # as in chapter 03
DEFAULT = Path(__file__).parents[2] / "shared" / "data" / "llama2_tokenizer.model"
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "meta_compression.json"


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if not path.is_file():
        print(f"there is no {path}: the stored figure stays", file=sys.stderr)
        return
    town, tokenizer = build_town(), Tokenizer(path)
    seen = {document.text for document in town.documents(CONFIG["documents"])}
    others = town.documents(CONFIG["unseen_documents"], seed=1)
    unseen = sorted({document.text for document in others} - seen)
    n_tokens = sum(map(len, tokenizer.encode_batch(unseen)))
    write_result(
        OUTPUT,
        config=CONFIG,
        seeds=[0, 1],
        modules=["town", "tokenizer"],
        script=__file__,
        results={
            "characters_per_token": sum(map(len, unseen)) / n_tokens,
            "vocab_size": tokenizer.vocab_size,
        },
    )


if __name__ == "__main__":
    main()

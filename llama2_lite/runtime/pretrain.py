"""`llama2-lite pretrain`: a Llama from the town or from files of one's own."""

from pathlib import Path

from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser

from llama2_lite.corpus import TokenDataset
from llama2_lite.model import Llama
from llama2_lite.pretraining import PretrainingModule
from llama2_lite.runtime.artifacts import write_json
from llama2_lite.runtime.command import TrainingCommand, as_texts
from llama2_lite.runtime.counts import count_windows, parse_count
from llama2_lite.runtime.progress import Samples, write_on
from llama2_lite.runtime.text_data import TextDataModule, choose_vocab_size
from llama2_lite.runtime.training import bits_per_character, evaluate_loss


class Pretrain(TrainingCommand):
    """The pretraining module, and the text."""

    name = "pretrain"
    module = PretrainingModule
    data = TextDataModule

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What belongs to no class."""
        super().add_default_arguments_to_parser(parser)
        add = parser.add_argument
        add("--prompts", type=str | list[str], default=[""], help="What to continue.")
        what = "Length of a sample."
        add("--sample_tokens", type=PositiveInt, default=200, help=what)
        what = "Tokens of a batch, such as 4M (4 x 2^20), in place of its windows."
        add("--batch_tokens", type=str | None, default=None, help=what)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What follows from something else."""
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("seed", "data.seed")
        parser.link_arguments("output", "data.folder")
        parser.link_arguments(
            ("data.tokenizer", "data.vocab_size"),
            "model.config.vocab_size",
            compute_fn=choose_vocab_size,
        )

    def before_instantiate_classes(self) -> None:
        """Choose what the configuration leaves open."""
        super().before_instantiate_classes()
        if self.config.batch_tokens is not None:
            batch = parse_count(self.config.batch_tokens, 1024)
            self.config.data.lengths = [
                (share, length, count_windows(batch, length))
                for share, length, _ in self.config.data.lengths
            ]

    def prompts(self) -> list[str]:
        """What samples continue."""
        return as_texts("prompts", self.config.prompts)

    def batches(self) -> list[tuple[int, int]]:
        """Sequence length and windows of a batch over all processes, for each kind."""
        return [(length, windows) for _, length, windows in self.datamodule.lengths]

    def callbacks(self) -> list[Callback]:
        """Progress and samples."""
        samples = Samples(self.tokenizer, self.prompts(), self.console)
        return [*super().callbacks(), samples]

    def finish(self, folder: Path) -> None:
        """Show what the best model writes, and measure it on all held-out text."""
        model = Llama.from_pretrained(folder / "model")
        for prompt in self.prompts():
            text = write_on(model, self.tokenizer(), prompt, self.config.sample_tokens)
            print(f"\n{text}")
        length = max(length for _, length, _ in self.datamodule.lengths)
        held_out = TokenDataset(self.datamodule.validation, length, verify=False)
        loss = evaluate_loss(model, held_out)
        bits = bits_per_character(loss, held_out)
        figures = {
            "validation_loss": loss,
            "bits_per_character": bits,
            "parameters": model.config.parameter_count(),
        }
        write_json(folder / "result.json", figures)
        print(
            f"\nvalidation loss {loss:.4f} nats per token, {bits:.4f} bits per "
            f"character; the model is in {folder / 'model'}"
        )

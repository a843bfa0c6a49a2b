"""One strategy of Lightning's for all layouts of a model over processes."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor

from llama2_lite.model import LlamaConfig
from llama2_lite.runtime.checkpoints import SafeCheckpointIO, encode_state
from llama2_lite.runtime.start import join_attempt, waiting_for_all
from llama2_lite.scaling import Layout, accumulation, lay_out, make_mesh

T = TypeVar("T")


class LayoutStrategy(ModelParallelStrategy):
    """Gives the module the `lay_out` of a layout; keeps its checkpoints in parts.

    Args:
        layout: how the model is divided; see `llama2_lite.scaling.Layout`.
    """

    checkpoint_io: SafeCheckpointIO

    def __init__(self, layout: Layout | None = None):
        super().__init__()
        self.layout = layout or Layout()

    def together(self, action: Callable[[], T]) -> T:
        """Do something in all processes, started and connected, before `Trainer.fit`.

        That starts them too, but has to be told which checkpoint they have chosen.
        """
        if self.launcher is None:
            self._connect()
            return action()
        try:
            self.launcher.launch(self._connect)
            return action()
        except KeyboardInterrupt:  # which the others need not have got
            self.launcher.kill(signal.SIGKILL)
            raise

    def _connect(self) -> None:
        with waiting_for_all(getattr(self.launcher, "procs", ())):
            backend = self._get_process_group_backend()
            join_attempt(backend, self._timeout, self.root_device)
            self._setup_distributed()

    def setup_environment(self) -> None:
        """Connect the processes, and tell the module where its models should live."""
        self._connect()
        module: Any = self.lightning_module
        sizes = self.layout.sizes(self.world_size, module.config)
        self._device_mesh = make_mesh(self.root_device.type, sizes)
        is_bf16 = "bf16" in self.precision_plugin.precision
        module.lay_out = partial(
            lay_out,
            mesh=self._device_mesh,
            layout=self.layout,
            dtype=torch.bfloat16 if is_bf16 else torch.float32,
        )

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which of how many different parts of the data this process sees."""
        mesh = self.device_mesh
        n_groups = mesh["replicate"].size() * mesh["shard"].size()
        rank = self.global_rank // mesh["tensor"].size()
        return {"num_replicas": n_groups, "rank": rank}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The parameters as they lie here."""
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state as it lies here."""
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write it; each process its part."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it, whatever the layout that wrote it; the parameters are filled."""
        owners = {
            f"optimizer_states/{number}/state/{i}": parameter
            for number, optimizer in enumerate(self.optimizers)
            for i, parameter in enumerate(
                parameter
                for group in optimizer.param_groups
                for parameter in group["params"]
            )
        }
        parameters: dict[str, Tensor] = {}
        encode_state({"state_dict": self.lightning_module_state_dict()}, parameters)

        def place(name: str, shape: torch.Size) -> Tensor | None:
            owner = owners.get(name.rpartition("/")[0])
            if owner is not None and owner.shape == shape:
                return torch.empty_like(owner)
            return parameters.get(name)

        path = Path(checkpoint_path)
        return self.checkpoint_io.load_checkpoint(path, place=place)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning calls `load_optimizer_state_dict`."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Take over what `load_checkpoint` has read."""
        Strategy.load_optimizer_state_dict(self, checkpoint)


def divide(
    given: dict[str, Any],
    layout: Layout,
    config: LlamaConfig,
    batches: list[tuple[int, int]],
    device_batch: int | None,
) -> dict[str, Any]:
    """Arguments of Lightning's trainer, with what follows from a layout.

    Args:
        given: arguments of the trainer.
        layout: what is asked for.
        config: of the model.
        batches: sequence length and number of windows of each kind of batch.
        device_batch: windows, of the longest, that a process takes at a time.

    Raises:
        ValueError: if processes, heads or batches cannot be divided so.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun says how many there are
        n_local = int(os.environ["LOCAL_WORLD_SIZE"])
        n_nodes = int(os.environ["WORLD_SIZE"]) // n_local
        given = given | {"devices": n_local, "num_nodes": n_nodes}
    keys = ("accelerator", "devices", "num_nodes")
    quiet = {"logger": False, "enable_checkpointing": False}
    probe = Trainer(**{key: given[key] for key in keys if key in given}, **quiet)
    n_processes = probe.num_devices * probe.num_nodes
    copies, shard, _ = layout.sizes(n_processes, config)
    if n_processes > 1 or layout != Layout():
        if given.get("strategy", "auto") != "auto":
            raise ValueError(
                f"trainer.strategy is {given['strategy']}, but it follows from "
                "--layout; leave it out"
            )
        given = given | {"strategy": LayoutStrategy(layout)}
    n_parts = given.get("accumulate_grad_batches", 1)
    longest = max(length for length, _ in batches)
    for length, batch in batches:
        at_most = device_batch * longest // length if device_batch else batch
        n_parts = max(n_parts, accumulation(batch, copies * shard, at_most))
    every = given.get("val_check_interval")
    if isinstance(every, int):  # Lightning counts parts
        given = given | {"val_check_interval": every * n_parts}
    return given | {"accumulate_grad_batches": n_parts}

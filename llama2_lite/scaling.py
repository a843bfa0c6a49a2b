"""Scaling.

Exported from book/10_scaling.md, which explains every part. Edit it there,
then `make export`.
"""

from dataclasses import dataclass

from llama2_lite.model import LlamaConfig


@dataclass(frozen=True)
class Layout:
    """How a model is laid out over processes, one for each device.

    Attributes:
        shard: processes that share one copy of weights, gradients and optimizer state,
            each with a part of every parameter; 0 for as many as there are, 1 for
            copies only.
        tensor: processes that share each matrix product.
        checkpoint_activations: whether the backward pass computes each block again
            instead of having kept what it needs.
        compile: whether blocks are compiled.
    """

    shard: int = 0
    tensor: int = 1
    checkpoint_activations: bool = False
    compile: bool = False

    def sizes(self, n_processes: int, config: LlamaConfig) -> tuple[int, int, int]:
        """Copies, processes that share a copy, and processes that share a product.

        Raises:
            ValueError: if the processes or the heads cannot be divided so.
        """
        if self.tensor < 1 or self.shard < 0:
            raise ValueError(
                f"layout.tensor = {self.tensor} and layout.shard = {self.shard}: "
                "the first must be at least 1, the second at least 0"
            )
        if n_processes % self.tensor:
            raise ValueError(
                f"{n_processes} processes cannot be divided into groups of "
                f"layout.tensor = {self.tensor}"
            )
        for name in ("n_heads", "n_kv_heads"):
            heads = getattr(config, name)
            if heads % self.tensor:
                raise ValueError(
                    f"layout.tensor = {self.tensor} does not divide {name} = {heads}: "
                    "each process of a group needs whole heads"
                )
        groups = n_processes // self.tensor
        shard = self.shard or groups
        if groups % shard:
            raise ValueError(
                f"{n_processes} processes / layout.tensor {self.tensor} = {groups} "
                f"groups, which layout.shard = {shard} does not divide"
            )
        return groups // shard, shard, self.tensor

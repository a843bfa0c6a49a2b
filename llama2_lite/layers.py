"""RMSNorm, SwiGLU and rotary embeddings.

Exported from book/05_layers.md, which explains every part. Edit it there,
then `make export`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale each feature.

    The mean square is computed in fp32 whatever the type of the input. Source:
    Zhang and Sennrich, 2019; paper §2.2; rounded where Meta's code rounds.

    Args:
        dim: number of features, C.
        eps: added to the mean square, so that zeros stay zeros.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of (..., C).

        Returns:
            The same shape, in the type of ``x``; under autocast, in autocast's.
        """
        normed = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        out = normed.to(x.dtype) * self.weight.to(x.dtype)
        device = x.device.type  # "meta" is PyTorch's for shapes without numbers
        if device != "meta" and torch.is_autocast_enabled(device):
            # several matrices read this, and each would round it for itself
            out = out.to(torch.get_autocast_dtype(device))
        return out


class FeedForward(nn.Module):
    """SwiGLU: a gate and a signal, multiplied, and mixed back to the model's width.

    Source: Shazeer, 2020; paper §2.2. The names of the matrices are Meta's.

    Args:
        dim: model width, C.
        hidden_dim: number of hidden features, see `feed_forward_size`.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of (..., C) by itself."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def feed_forward_size(
    dim: int, multiple_of: int, multiplier: float | None = None
) -> int:
    """Hidden size of the feed-forward layer, rounded as in Meta's code.

    Args:
        dim: model width, C.
        multiple_of: the result is the next multiple of this.
        multiplier: widens the layer before it is rounded; 1.3 in the 70B model.

    Raises:
        ValueError: if a size is not positive.
    """
    if dim < 1 or multiple_of < 1:
        raise ValueError(f"{dim=} and {multiple_of=} must be positive")
    hidden = int(8 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


def rope_table(
    max_len: int,
    head_dim: int,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles; row m is for position m.

    Computed on the CPU, so that every device gets the same numbers. Source: Su et
    al., 2021; paper §2.2; frequencies and angles in fp32, as in Meta's code.

    Args:
        max_len: number of positions.
        head_dim: width of a head, D.
        theta: base of the wavelengths.
        device: where the tables go.

    Returns:
        Cosines and sines, both (max_len, D/2), fp32.

    Raises:
        ValueError: if ``head_dim`` is odd, so that a feature would be without a pair.
    """
    if head_dim % 2:
        raise ValueError(f"{head_dim=} is odd, but rotary embeddings need pairs")
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    positions = torch.arange(max_len, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / theta ** (even / head_dim)
    angles = positions[:, None] * frequencies  # (max_len, D/2)
    return angles.cos().to(device), angles.sin().to(device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of queries or keys by the angles of their positions.

    The pairs are Meta's; Hugging Face pairs i with i + D/2.

    Args:
        x: (B, T, H, D), any floating point type; computed in fp32.
        cos, sin: rows of `rope_table` for the T positions, (T, D/2) or (B, T, D/2).

    Returns:
        (B, T, H, D), in the type of ``x``.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, T, H, D/2, 2)
    if torch.compiler.is_compiling():
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        factors = torch.complex(cos, sin)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * factors)
    return turned.flatten(-2).to(x.dtype)

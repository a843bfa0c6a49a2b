"""The recipes of a tour in a size of seconds."""

from typing import Any

BASE: dict[str, Any] = {
    "documents": 1500,
    "validation_documents": 200,
    "vocab_size": 400,
    "model": "town-small",
    "model_overrides": {"dim": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 512},
    "max_steps": 12,
    "peak_lr": 4e-3,
    "warmup": 2,
    "lengths": [[0.75, 32, 4], [0.25, 128, 1]],
    "validate_every": 6,
    "checkpoint_every": 4,
}


def shrink(recipe: dict[str, Any]) -> None:
    """Ask and learn little in the stages that rounds and the tour share."""
    recipe["preferences"] |= {
        "helpful_requests": 30,
        "safety_requests": 30,
        "written": 20,
        "refusals": 10,
        "held_out_requests": 40,
    }
    for how in recipe["reward"].values():
        how["batch_size"] = 16
    recipe["rejection"] |= {"requests": 40, "batch_size": 8}
    recipe["ppo"] |= {"iterations": 2, "batch_size": 16, "requests": 64}
    recipe["ppo"]["settings"] |= {"minibatch_size": 8, "max_new_tokens": 48}

"""What a model folder's configs may not do: ask for absurd sizes, or name code to fetch and run.

A config decides what is built, before any weight is read: a wrong number there would take all
memory, and some keys make the libraries run code of a repository that they download.
"""

from collections.abc import Iterator
from typing import Any

# key of a config -> the largest sane value; lists hold one number for each level.
LARGEST = {
    "num_hidden_layers": 128, "hidden_size": 16384, "intermediate_size": 131072,
    "num_attention_heads": 1024, "vocab_size": 2_000_000, "max_position_embeddings": 8192,
    "projection_dim": 16384, "block_out_channels": 16384, "layers_per_block": 64,
    "transformer_layers_per_block": 128, "attention_head_dim": 16384, "cross_attention_dim": 32768,
    "sample_size": 8192, "in_channels": 1024, "out_channels": 1024, "latent_channels": 1024,
    "norm_num_groups": 1024, "num_train_timesteps": 100_000, "encoder_hid_dim": 32768,
}  # fmt: skip
MOST_LEVELS = 16  # of a network, entries of a list
# Keys by which a folder could choose code, or a repository to fetch it from.
NAMES_CODE = ("auto_map", "trust_remote_code", "custom_pipeline", "use_kernels", "kernel_config")
ATTENTION = ("_attn_implementation", "attn_implementation")
OWN_ATTENTION = (None, "eager", "sdpa")  # transformers fetches any other from the hub


def check_limits(config: dict[str, Any], file: str) -> None:
    """ValueError, with the key, if ``config`` has a size that nothing sane has, or names code."""
    for key, value in _items(config):
        if key in NAMES_CODE and value:
            raise ValueError(
                f"{file}: {key} names code to run, and a model folder chooses none; remove the key"
            )
        if key in ATTENTION and value not in OWN_ATTENTION:
            raise ValueError(
                f"{file}: {key} {str(value)[:80]!r} would fetch code from the hub; remove the key"
            )
        if key in LARGEST and value is not None:
            _check_size(key, value, file)


def _items(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a config and of the configs in it, at most two levels deep."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from ((str(inner), each) for inner, each in value.items())


def _check_size(key: str, value: Any, file: str) -> None:
    numbers = value if isinstance(value, list) else [value]
    flat = [n for each in numbers for n in (each if isinstance(each, list) else [each])]
    if len(flat) > MOST_LEVELS**2 or len(numbers) > MOST_LEVELS:
        raise ValueError(f"{file}: {key} has {len(flat)} entries; expected {MOST_LEVELS} or fewer")
    for number in flat:
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not whole or not 1 <= number <= LARGEST[key]:
            raise ValueError(
                f"{file}: {key} {str(number)[:40]}; expected a whole number from 1 to "
                f"{LARGEST[key]}; download the model again"
            )

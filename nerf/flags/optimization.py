"""Flags of the optimizer, for both scripts."""

from nerf.flags.parser import Parser
from nerf.flags.types import (
    decay,
    non_negative,
    non_negative_int,
    non_negative_schedule,
    positive_int,
    rate_schedule,
)

# For the sentence of a section with schedules.
SCHEDULE = (
    "SCHEDULE is a number, or step:value,step:value with straight lines between; step:value:exp, "
    ":cosine or :step says how the value gets there."
)

# fmt: off


def add_optimization_flags(parser: Parser) -> None:
    """Flags of the optimizer."""
    section = parser.section(
        "optimization", f"Learning rates, precision and averaging of the weights. {SCHEDULE}"
    )
    flag = section.flag
    flag("lrate", rate_schedule, 5e-4,
        "initial learning rate; a schedule gives the learning rate of each update and replaces "
        "--lr_schedule and --lrate_warmup")
    flag("lrate_decay", positive_int, 250,
        "with --lr_schedule exp: number of updates, in thousands, in which the learning rate falls "
        "to a tenth")
    flag("lr_schedule", ("exp", "cosine"), "exp",
        "exp: exponential decay by --lrate_decay; cosine: half a cosine, down to 0.02 of --lrate "
        "at --N_iters")
    flag("lrate_grid", non_negative_schedule, 8e-2,
        "learning rate of the features on grids (--field triplane or hashgrid), as --lrate")
    flag("lrate_warmup", non_negative_int, 0,
        "number of updates, from the first on, in which the learning rate rises linearly; 0: no "
        "warm-up")
    flag("optim", ("adam", "adamw"), "adam",
        "optimizer: Adam, or AdamW (decoupled weight decay)")
    flag("adam_betas", decay, None,
        "decay rates of Adam's first and second moment; default: 0.9 0.999 for a NeRF without "
        "occupancy grid, else 0.9 0.99", nargs=2, metavar=("BETA1", "BETA2"))
    flag("adam_eps", non_negative, None,
        "Adam's epsilon, added to the denominator; default: 1e-8 for a NeRF without occupancy "
        "grid, else 1e-15")
    flag("weight_decay", non_negative, 0.0, "weight decay of --optim; 0: none")
    flag("amp", ("off", "bf16", "fp16"), "off",
        "half precision in the networks (autocast); fp16 also scales the loss")
    flag("tf32", ("on", "off"), "on",
        "NVIDIA GPUs: compute float32 matrix products in TF32, several times as fast, with a "
        "10-bit mantissa; off: full float32, as in nerf-pytorch")
    flag("static_shapes", ("auto", "on", "off"), "auto",
        "train with tensors of constant shape, without waiting for the GPU in each update; auto: "
        "on a GPU")
    flag("cuda_graph", ("auto", "off"), "auto",
        "auto: record forward and backward as CUDA graphs if shapes are constant and a single "
        "process trains; off: launch each kernel from Python")
    flag("ema_decay", decay, 0.0,
        "decay per update of an exponential moving average of the weights, which is used for "
        "rendering and measuring, e.g. 0.999; 0: no average")
    flag("grad_clip", non_negative, 0.0,
        "maximum norm of the gradient of all weights together; 0: no clipping")

"""The run's configuration as the dictionary that `deepspeed.initialize` takes.

DeepSpeed ignores unknown keys at the top and has surprising defaults (gradient clipping at 1.0), so everything that
matters is set.
"""

from __future__ import annotations

from typing import Any

from vat_fast.train.config import Config


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's configuration of a resolved `Config`.

    Autocast is not DeepSpeed's here but `TrainingModel`'s: parameters and gradients stay float32 for it.
    """
    t, z = config.train, config.zero
    host = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {
        "stage": z.stage,
        "overlap_comm": z.overlap and z.stage > 0,
        "contiguous_gradients": True,
        "reduce_bucket_size": z.bucket,
        "allgather_bucket_size": z.bucket,
    }
    if z.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if z.offload != "none":
        zero["offload_optimizer"] = host
    if z.offload == "all":
        zero["offload_param"] = host
    return {
        "train_batch_size": t.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": t.clip or 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": t.precision == "bf16"},
        # PyTorch's fused AdamW runs everywhere, offloaded too, and builds nothing.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }

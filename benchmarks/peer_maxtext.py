"""Compiles MaxText's train step for absent TPUs, in MaxText's own environment.

    PYTHON benchmarks/peer_maxtext.py PROGRAM.hlo key=value ...

The keys are MaxText's (`compile_topology=v5e-16 model_name=llama2-7b ...`). Writes the compiled
program's text to PROGRAM.hlo and prints, as the last line on stdout, {"peak_bytes": ..., "places":
[coordinates of each device, in the program's order]}.
"""

import json
import sys
from pathlib import Path

import jax
from absl import app
from maxtext.trainers.pre_train import train_compile
from maxtext.utils import lora_utils, model_creation_utils


def attach_adapters() -> None:
    """Attaches LoRA's adapters, if the keys ask for them, as MaxText's `train_sft` does.

    `train_compile` attaches none: then its gradient has no parameters, and is the forward pass.
    """
    creator = model_creation_utils.get_nnx_create_model_fn
    inputs = lora_utils._prepare_dummy_inputs

    def with_adapters(config, mesh, *args, **kwargs):
        create = creator(config, mesh, *args, **kwargs)
        # The adapters' shapes come from a traced call: flash attention takes no single token.
        lora_utils._prepare_dummy_inputs = lambda _: inputs(mesh, seq_len=config.max_target_length)
        return lambda: lora_utils.apply_lora_to_model(create(), None, config)

    model_creation_utils.get_nnx_create_model_fn = with_adapters


def main() -> None:
    file = Path(sys.argv.pop(1))
    jit_and_compile = train_compile.jit_and_compile

    def kept(*args, **kwargs):
        compiled = jit_and_compile(*args, **kwargs)
        file.write_text(compiled.as_text())
        stats = compiled.memory_analysis()
        outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
        total = stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes
        # The smaller of two upper bounds, as jllama.plan.step counts.
        peak = min(total, stats.peak_memory_in_bytes or total)
        (mesh,) = (x for x in (*args, *kwargs.values()) if isinstance(x, jax.sharding.Mesh))
        places = [list(device.coords) for device in mesh.devices.flat]
        print(json.dumps({"peak_bytes": peak, "places": places}))
        sys.exit(0)  # MaxText would go on to print the compiler's statistics

    train_compile.jit_and_compile = kept
    attach_adapters()
    app.run(train_compile.main)


if __name__ == "__main__":
    main()

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
    app.run(train_compile.main)


if __name__ == "__main__":
    main()

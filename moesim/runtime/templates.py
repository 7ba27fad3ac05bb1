"""Scripts that start `moesim launch` with one process per rank: by torchrun, on one machine or several, or by Slurm.

They pass further options on (`bash launch.sh --port 7000`), so that one script serves a plan with any of them. Ranks are numbered machine by
machine, which keeps a tensor-parallel group on one machine wherever the plan's `num_ranks` fits.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from moesim.errors import InputError, describe

TORCHRUN = """\
#!/usr/bin/env bash
# Serves {what} with {world} ranks on {nodes} machine(s) by torchrun; options of `moesim launch` may follow: bash launch.sh --port 7000
# On several machines run it on each, with NODE_RANK=0, 1, ... and MASTER_ADDR naming the one with NODE_RANK=0.
# The ranks meet at MASTER_PORT and MASTER_PORT + 1; the control port is on the first machine.
set -euo pipefail
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
exec "${{PYTHON:-python3}}" -m torch.distributed.run --nnodes={nodes} --nproc-per-node={each} --node-rank="${{NODE_RANK:-0}}" \\
  --rdzv-backend=static --master-addr="{address}" --master-port="${{MASTER_PORT:-29500}}" \\
  -m moesim launch {arguments} --launcher env "$@"
"""
SLURM = """\
#!/usr/bin/env bash
#SBATCH --job-name=moesim
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={each}
# Serves {what} with {world} ranks; options of `moesim launch` may follow: sbatch launch.sh --host 0.0.0.0 --port 7000 (with MOESIM_TOKEN set)
# The ranks meet at MASTER_PORT + 1 of the first machine; the control port is there, too.
set -euo pipefail
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR MASTER_PORT="${{MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}}" OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
exec srun --distribution=block --kill-on-bad-exit=1 bash -c 'RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" exec "$0" -m moesim launch "$@"' \\
  "${{PYTHON:-python3}}" {arguments} --launcher env "$@"
"""
KINDS = {"torchrun": TORCHRUN, "slurm": SLURM}


def script(kind: str, *, plan: Path, model: str, world: int, nodes: int = 1) -> str:
    """Return the shell script that serves `plan` on `world` ranks of `nodes` machines; raise InputError if the ranks cannot be dealt out."""
    if kind not in KINDS:
        raise InputError(describe("launch", "--write-template", kind, f"must be one of {', '.join(KINDS)}"))
    if world % nodes:
        raise InputError(describe("launch", "--nodes", nodes, f"must divide the {world} ranks of the plan"))
    named = Path(model)
    config = str(named.absolute()) if named.exists() else model
    arguments = " ".join(shlex.quote(word) for word in (str(plan.absolute()), "--model", config))
    address = "${MASTER_ADDR:-127.0.0.1}" if nodes == 1 else "${MASTER_ADDR:?names the machine with NODE_RANK=0}"
    what = " ".join(model.split())  # a comment stays one line
    return KINDS[kind].format(what=what, world=world, nodes=nodes, each=world // nodes, address=address, arguments=arguments)

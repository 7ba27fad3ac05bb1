"""The `moesim` command: finds the module of a subcommand, runs it, turns errors into one line and an exit code.

A subcommand's module is imported only when it is called, so that `moesim --help` stays instant.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys

from moesim.errors import MoesimError

COMMANDS = {
    "replay": "run a routing trace on a cluster and report where the time goes",
    "solve": "compute an expert placement with its bound and its predicted gain",
    "parallel": "search how to split a model: tensor, expert, data and pipeline degrees, batches, pools",
    "rebalance": "say whether rebalancing during serving is worth it on a trace",
    "validate": "compare predictions with measurements",
    "apply": "carry a plan out on a live deployment",
    "watch": "rebalance a live deployment when its loads drift, and export metrics",
    "launch": "start a deployment with the mesh and placement of a plan, here, by torchrun or by Slurm",
    "serve-demo": "start a live expert-parallel deployment on this machine",
    "capture": "run a Hugging Face MoE model and record its routing",
    "calibrate": "measure this machine and write it as hardware with tables",
    "compare": "put a plan's prediction beside what was measured under it",
    "demo": "walk the whole loop once: replay, solve, serve, apply",
    "trace": "info, import, export and synthesise routing traces",
    "plan": "show, compare, check, export and import plans",
    "hardware": "list, show and check hardware descriptions",
    "model": "list and show model configurations",
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: moesim COMMAND [ARGS]...",
            "",
            "Simulate and plan Mixture-of-Experts deployments.",
            "",
            "Commands:",
            *lines,
            "",
            "moesim COMMAND --help explains a command; moesim --version prints the version.",
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits 0 ok, 1 infeasible or failed check, 2 usage or bad input."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from moesim import __version__

        print(f"moesim {__version__}")
        sys.exit(0)
    name = words[0]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "moesim --help lists the commands"
        print(f"moesim: {name!r} is not a command; {hint}", file=sys.stderr)
        sys.exit(2)
    gc.set_threshold(50_000, 50, 50)  # imports make many objects and no garbage: collecting as often as by default costs a tenth of a small replay
    app = importlib.import_module(f"moesim.cli.{name.replace('-', '_')}").app
    try:
        app(args=words[1:], prog_name=f"moesim {name}")
    except MoesimError as error:
        print(f"moesim: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("moesim: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()

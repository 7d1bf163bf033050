"""The train command: its options, and what happens from the first file to the exported model."""

import argparse
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2fast.files import cache_folder

if TYPE_CHECKING:
    from gpt2fast.model import GPT2LMHeadModel
    from gpt2fast.training.trainer import Trainer

_SIZES = ("n_positions", "n_embd", "n_layer", "n_head")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gpt2fast train`` to ``parser``."""
    from gpt2fast.cli import positive

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or globs: .txt or .xz with documents separated by a line <|endoftext|>, "
        "or .bin with uint16 token ids",
    )
    data.add_argument("--valid", nargs="+", metavar="FILE", help="the same, for validation")
    data.add_argument(
        "--cache-dir",
        default=str(cache_folder("tokens")),
        help="where token ids are kept (%(default)s)",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--init-from", metavar="NAME", help="fine-tune a preset, Hub name or folder")
    model.add_argument("--preset", help="sizes of a published model; default: own sizes below")
    model.add_argument("--n-positions", type=int, help="default 1024")
    model.add_argument("--n-embd", type=int, help="default 128")
    model.add_argument("--n-layer", type=int, help="default 7")
    model.add_argument("--n-head", type=int, help="default 2")
    model.add_argument("--dropout", type=float, default=0.0, help="default %(default)s")

    run = parser.add_argument_group("run")
    run.add_argument("--out", required=True, metavar="FOLDER", help="receives everything")
    run.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint in --out, if there is one",
    )
    run.add_argument("--steps", type=int, help="length of the schedule in optimizer steps")
    run.add_argument(
        "--max-minutes",
        type=float,
        dest="minutes",
        help="length of the schedule in minutes of training: warm-up aside, the "
        "learning rate follows step/steps or time/max-minutes, whichever is further, "
        "so it decays on time however fast the machine is; a resumed run counts the "
        "minutes it had used",
    )
    run.add_argument(
        "--batch-tokens",
        type=int,
        default=2048,
        help="a step, of all processes together (%(default)s)",
    )
    run.add_argument(
        "--accumulate",
        type=int,
        default=1,
        help="parts that a process computes its share of a step in (%(default)s)",
    )
    run.add_argument(
        "--row-tokens",
        type=int,
        default=256,
        help="length of a training row at first (%(default)s)",
    )
    run.add_argument(
        "--long-from",
        type=float,
        default=0.85,
        metavar="FRACTION",
        help="from here on rows have n_positions tokens (%(default)s)",
    )
    run.add_argument(
        "--sampled-head",
        type=int,
        default=0,
        metavar="N",
        help="at first, about N random tokens in the softmax (0: the whole vocabulary)",
    )
    run.add_argument(
        "--whole-from",
        type=float,
        default=0.95,
        metavar="FRACTION",
        help="from here on the whole vocabulary in the softmax (%(default)s)",
    )
    run.add_argument("--lr", type=float, default=3e-3, help="peak (%(default)s)")
    run.add_argument("--warmup", type=int, default=300, help="steps (%(default)s)")
    run.add_argument("--beta1", type=float, default=0.9, help="AdamW (%(default)s)")
    run.add_argument("--beta2", type=float, default=0.999, help="AdamW (%(default)s)")
    run.add_argument("--weight-decay", type=float, default=0.1, help="matrices (%(default)s)")
    run.add_argument("--clip", type=float, default=1.0, help="gradient norm (%(default)s)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the matrix products; weights stay float32 (%(default)s)",
    )
    run.add_argument("--device", help="default: cuda where there is one, else cpu")
    run.add_argument("--threads", type=positive, help="CPU threads")
    run.add_argument(
        "--compile", action="store_true", help="run the layers through torch.compile in training"
    )
    run.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="under torchrun: the whole model in every process, or parameters, gradients and "
        "optimizer state sharded over them (%(default)s)",
    )

    report = parser.add_argument_group("reports")
    report.add_argument("--log-every", type=int, default=50, help="steps (%(default)s)")
    report.add_argument("--valid-every", type=int, default=500, help="steps (%(default)s)")
    report.add_argument(
        "--valid-tokens",
        type=positive,
        default=32768,
        help="of each validation but the last, which takes all (%(default)s)",
    )
    report.add_argument("--save-every", type=int, default=500, help="steps (%(default)s)")
    report.add_argument(
        "--baselines",
        action="store_true",
        help="also score a unigram and a bigram model of the same data",
    )
    report.add_argument(
        "--export-dtype",
        choices=("float32", "float16"),
        default="float16",
        help="of the weights in the exported model.safetensors (%(default)s); "
        "they are loaded in float32 either way",
    )


def run(args: argparse.Namespace) -> int:
    """Train a GPT-2 on text files; writes checkpoints, a log, a plot and the finished model.

    Returns the exit status: 0 when finished, 128 + the signal's number when stopped by SIGINT or
    SIGTERM (the run is saved: repeat the command with --resume), 1 after an error, which is
    printed.
    """
    from gpt2fast.training.distributed import launched
    from gpt2fast.training.trainer import TrainingError

    try:
        return _run(args)
    except (ValueError, OSError, TrainingError) as error:
        process = f"process {os.environ['RANK']}: " if launched() else ""
        print(f"error: {process}{error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    import torch

    from gpt2fast.cli import pick_device
    from gpt2fast.training.data import find_files, load_tokens, own_tokenizer
    from gpt2fast.training.distributed import launched, own_device, start_workers
    from gpt2fast.training.settings import Settings
    from gpt2fast.training.state import checkpoint_folders, claimed
    from gpt2fast.training.trainer import Trainer

    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    out = Path(args.out)
    checkpoints = out / "checkpoints"

    def check_new() -> None:
        if checkpoint_folders(checkpoints) and not args.resume:
            raise ValueError(f"{out} holds a run already: add --resume, or choose another --out")

    check_new()
    device = own_device(pick_device(args.device))
    cache = Path(args.cache_dir).expanduser()
    files = find_files(args.data)
    valid_files = find_files(args.valid) if args.valid else []
    torch.manual_seed(args.seed)
    model = _build_model(args).to(device)
    tokenizer = None
    if args.init_from and any(path.suffix != ".bin" for path in (*files, *valid_files)):
        tokenizer = own_tokenizer(args.init_from)
    train = load_tokens(files, cache, tokenizer)
    valid = load_tokens(valid_files, cache, tokenizer) if valid_files else None
    first = not launched() or os.environ["RANK"] == "0"
    with (
        claimed(checkpoints) if first else nullcontext(),
        start_workers(args.parallel, device) as workers,
    ):
        if first:
            check_new()  # another run may have ended in the meantime
        trainer = Trainer(
            model,
            train,
            valid,
            out,
            settings,
            data_id=Path(str(train.filename)).stem,
            log_every=args.log_every,
            valid_every=args.valid_every,
            save_every=args.save_every,
            valid_tokens=args.valid_tokens,
            compile=args.compile,
            workers=workers,
        )
        reports = trainer.reports
        reports.say(
            f"{model.num_parameters():,} parameters on {device.type}"
            + (f", {workers.count} processes ({workers.parallel})" if workers.count > 1 else "")
            + f", {len(train):,} training tokens"
            + (f", {len(valid):,} validation tokens" if valid is not None else "")
        )
        if args.resume and trainer.resume():
            reports.say(f"resumed at step {trainer.step}, {trainer.elapsed / 60:.1f} min")
        else:
            reports.start()
        if number := trainer.run():
            reports.say(f"stopped at step {trainer.step}: saved, go on with --resume")
            return 128 + number
        if tokenizer is not None and workers.rank == 0:
            tokenizer.save_pretrained(out)
        _finish(args, trainer)
    return 0


def _build_model(args: argparse.Namespace) -> "GPT2LMHeadModel":
    from gpt2fast.config import PRESETS, GPT2Config
    from gpt2fast.model import GPT2LMHeadModel

    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), args.dropout)
    sizes = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    if args.init_from:
        if args.preset or sizes:
            raise ValueError("--init-from brings its own sizes: leave out --preset and --n-...")
        if Path(args.init_from).resolve() == Path(args.out).resolve():
            raise ValueError(f"--out {args.out} would replace the model of --init-from")
        model = GPT2LMHeadModel.from_pretrained(args.init_from, dtype="float32", **dropout)
        try:
            return model.train()
        except RuntimeError as error:  # of low-bit weights
            raise ValueError(f"--init-from {args.init_from}: {error}") from error
    if args.preset is not None:
        if args.preset not in PRESETS:
            raise ValueError(f"--preset is one of {', '.join(PRESETS)}, got {args.preset!r}")
        fields: dict[str, Any] = {**PRESETS[args.preset], **sizes}
    else:
        fields = {"n_positions": 1024, "n_embd": 128, "n_layer": 7, "n_head": 2, **sizes}
    return GPT2LMHeadModel(GPT2Config(**fields, **dropout))


def _finish(args: argparse.Namespace, trainer: "Trainer") -> None:
    """Export the model, score it on all validation tokens, and write the summary and the plot."""
    import torch

    from gpt2fast.training.baselines import bigram_nats, unigram_nats
    from gpt2fast.training.plot import plot_loss

    model, valid, out, reports = trainer.model, trainer.valid, trainer.folder, trainer.reports
    summary: dict[str, Any] = {
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "minutes": round(trainer.elapsed / 60, 1),
        "parameters": model.num_parameters(),
        "training_tokens": len(trainer.order.tokens),
        "settings": asdict(trainer.settings),
    }
    # Scored as exported: rounded to the dtype that goes on disk, computed in float32.
    storage_dtype = getattr(torch, args.export_dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(storage_dtype))
    full = trainer.full_parameters()
    if reports.active:
        model.save_pretrained(out, storage_dtype=storage_dtype, state_dict=full)
    if valid is not None:
        summary["validation_tokens"] = len(valid)
        for row_tokens in sorted({args.row_tokens, model.config.n_positions}):
            loss = trainer.evaluate(row_tokens)
            summary[f"validation_loss_rows_of_{row_tokens}"] = round(loss, 4)
            reports.say(f"validation loss {loss:.4f}, rows of {row_tokens} tokens")
    if not reports.active:
        return
    if valid is not None and args.baselines:
        for name, score in (("unigram", unigram_nats), ("bigram", bigram_nats)):
            loss = score(trainer.order.tokens, valid, model.config.vocab_size)
            summary[f"validation_loss_{name}"] = round(loss, 4)
            reports.say(f"validation loss {loss:.4f}, {name} baseline")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if not plot_loss(reports.path, out / "loss.png", summary):
        reports.say("no loss plot: matplotlib is not installed")
    reports.say(f"model in {out}")

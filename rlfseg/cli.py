"""The command line: one table of commands, each a config class and the function that takes it."""

from __future__ import annotations

import importlib
import io
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings  # type: ignore[attr-defined]
from pydantic import TypeAdapter, ValidationError

from rlfseg import __version__, config
from rlfseg.errors import REFUSED_SOME, ConfigError, JobError, RlfsegError

FAILED = 1


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: its config class, the module whose `run` takes it, and what its help teaches."""

    settings: type
    module: str
    what: str
    goes_in: str
    comes_out: str
    example: str
    positional: dict[str, str] = field(default_factory=dict)  # settings given without their name, and what they are


MANY = {
    "files": "+",
    "command": "+",
    "phrases": "+",
    "what": "*",
}  # settings that take several values without their name
COMMANDS: dict[str, Command] = {
    "prepare": Command(
        settings=config.PrepareConfig,
        module="rlfseg.pipeline.prepare",
        what="write a data set as HDF5 shards in the paper's layout, with an index",
        goes_in="drawn scenes, or a data set in its own form: PhraseCut, RefCOCO, RefCOCO+, G-Ref, gRefCOCO, COCO, "
        "COCO-Stuff, LabelMe, HDF5, or images with mask PNGs and a list of phrases (docs/data.md)",
        comes_out="OUT/*.h5, OUT/index.parquet",
        example="rlfseg prepare --source folder --path photos/index.json --splits '[train]' --out runs/a/train",
    ),
    "refine": Command(
        settings=config.RefineConfig,
        module="rlfseg.pipeline.refine",
        what="refine polygon-like labels with SAM (Eq. 3, Algorithm 1)",
        goes_in="a folder of `prepare`",
        comes_out="OUT/data/*.parquet: a refined mask a phrase, or why the original was kept",
        example="rlfseg refine --samples runs/a/train --sam.checkpoint sam_vit_h_4b8939.pth --run.workers 8 "
        "--out runs/a/refined",
    ),
    "encode": Command(
        settings=config.EncodeConfig,
        module="rlfseg.pipeline.encode",
        what="encode images and masks into latents, once",
        goes_in="a folder of `refine` (both labels) or of `prepare` (original labels only)",
        comes_out="OUT/data/*.parquet: latents in fp16",
        example="rlfseg encode --samples runs/a/refined --run.workers 8 --out runs/a/latents",
    ),
    "train": Command(
        settings=config.TrainConfig,
        module="rlfseg.pipeline.train",
        what="train an adapter by rectified flow with dynamic selection (Eq. 2, 4)",
        goes_in="a folder of `encode`, and of `prepare` for validation",
        comes_out="OUT/adapter, OUT/curves.png, OUT/overlays, checkpoints, an MLflow run",
        example="rlfseg train --latents runs/a/latents --val_samples runs/a/val --workers 8 --out runs/a/train-1",
    ),
    "calibrate": Command(
        settings=config.CalibrateConfig,
        module="rlfseg.pipeline.calibrate",
        what="choose threshold and eps on a validation split and write them into the adapter",
        goes_in="an adapter folder and a folder of `prepare`",
        comes_out="the adapter's rlfseg.yaml, OUT/calibration.json, OUT/calibration.png",
        example="rlfseg calibrate --adapter runs/a/train-1/adapter --samples runs/a/val --out runs/a/calibration",
    ),
    "evaluate": Command(
        settings=config.EvaluateConfig,
        module="rlfseg.pipeline.evaluate",
        what="measure an adapter, or predictions of any system, by named protocols",
        goes_in="a folder of `prepare` with true masks; an adapter, or predictions in Parquet, HDF5 or PNGs",
        comes_out="OUT/results.json, results.md, curves.json, curves and overlays as PNGs, an MLflow run",
        example="rlfseg evaluate --adapter runs/a/train-1/adapter --samples runs/a/test --sampling.rescale aos "
        "--protocol '[rlfseg,clipseg]' --out runs/a/test-aos",
    ),
    "predict": Command(
        settings=config.PredictConfig,
        module="rlfseg.pipeline.predict",
        what="segment many pictures by phrases",
        goes_in="a picture, a folder, a glob, a Parquet file with `path` and `phrases`, or a folder of `prepare`",
        comes_out="OUT/data/*.parquet (COCO RLE), OUT/png, OUT/overlays, OUT/refused.json",
        example="rlfseg predict --adapter runs/a/train-1/adapter --images photos --phrases '[dog, red car]' "
        "--overlays true --out runs/masks",
    ),
    "export": Command(
        settings=config.ExportConfig,
        module="rlfseg.pipeline.export",
        what="write an adapter for diffusers, or refined labels as HDF5",
        goes_in="an adapter, or a folder of `refine`",
        comes_out="OUT/pytorch_lora_weights.safetensors for `pipe.load_lora_weights(OUT)`; or OUT/*.h5 in the paper's "
        "layout and OUT/index.parquet",
        example="rlfseg export --adapter runs/a/train-1/adapter --out runs/a/diffusers",
    ),
    "inspect": Command(
        settings=config.InspectConfig,
        module="rlfseg.pipeline.inspect",
        what="show what is in files of samples: counts, sizes, captions, masks, problems, a contact sheet",
        goes_in="HDF5 files or folders of some, of any origin",
        comes_out="a table, OUT/contents.json, OUT/contact_sheet.png",
        example="rlfseg inspect runs/a/train their_phrasecut.h5 --out runs/look",
        positional={"files": "HDF5 files, or folders that hold some"},
    ),
    "verify": Command(
        settings=config.VerifyConfig,
        module="rlfseg.pipeline.verify",
        what="read everything in files and folders, and fail at the first damage",
        goes_in="HDF5 files, pictures, lists of phrases, Parquet files, adapters, folders of any command",
        comes_out="exit code 0 if all is whole, else 1 and what is damaged",
        example="rlfseg verify runs/a/train runs/a/refined runs/a/latents runs/a/train-1",
        positional={"files": "files and folders, see above"},
    ),
    "audit": Command(
        settings=config.AuditConfig,
        module="rlfseg.pipeline.audit",
        what="find the images that two sets share, by COCO ids and by perceptual hashes",
        goes_in="two folders of `prepare`, or of pictures",
        comes_out="OUT/audit.json, OUT/exclude_ids.txt for `prepare --exclude_ids`, OUT/pairs.png",
        example="rlfseg audit runs/a/train runs/a/test --run.workers 8 --out runs/a/audit",
        positional={
            "train": "folder of `prepare` or of pictures: the set whose images are to be excluded",
            "test": "the same: the set that should hold none of them",
        },
    ),
    "submit": Command(
        settings=config.SubmitConfig,
        module="rlfseg.pipeline.submit",
        what="run a command as a Ray job and exit with the job's own code",
        goes_in="a command with its settings after `--`, and the repository that it is to run from",
        comes_out="what the job prints",
        example="rlfseg submit --address http://head:8265 -- train --config jobs/configs/paper/train.yaml "
        "--latents /nfs/latents --out /nfs/a",
        positional={"command": "a command and its settings, after `--`"},
    ),
    "serve": Command(
        settings=config.ServeConfig,
        module="serve.app",
        what="serve models over HTTP on one machine",
        goes_in="adapters by name",
        comes_out="a page and an API on http://127.0.0.1:8000; docs/serving.md tells how to open it to others safely",
        example="rlfseg serve --models.photos runs/a/train-1/adapter",
    ),
    "segment": Command(
        settings=config.SegmentConfig,
        module="rlfseg.ask",
        what="segment one picture by phrases, here or by a service",
        goes_in="a picture and phrases",
        comes_out="OUT/NAME-00.png, -01.png ... a phrase each, OUT/NAME-overlay.png",
        example="rlfseg segment picture.jpg 'red ring' 'blue star' --out masks --url http://127.0.0.1:8000",
        positional={"image": "a picture", "phrases": "what to look for, one or more"},
    ),
    "bench": Command(
        settings=config.BenchConfig,
        module="rlfseg.pipeline.bench",
        what="measure rlfseg's ways against the plain ones, as ratios in one run",
        goes_in="nothing",
        comes_out="a table, OUT/bench.json (a list of its rows), OUT/machine.json, an MLflow run",
        example="rlfseg bench data model --out runs/bench",
        positional={"what": "what to measure: some of data, model, stages, sd, serve; none: all of them"},
    ),
}  # fmt: skip


class Parser(ArgumentParser):
    """Tells where its own words would leave a user alone."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends with exit code 2."""
        if "<class 'tuple'>" in message:
            message += "; a list is written '[dog, red car]'"
        if self.prog == "rlfseg submit":
            message += "; the command and its settings come after `--`"
        super().error(message, ex)


def entry() -> None:
    """`rlfseg COMMAND ...`."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        sys.exit(main(arguments[0], arguments[1:]))
    if arguments in (["--version"], ["version"]):
        print(f"rlfseg {__version__}")
        sys.exit(0)
    print(_overview())
    if arguments and arguments[0] not in ("-h", "--help", "help"):
        print(f"\nunknown command {arguments[0]!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def main(name: str, arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        name: A key of COMMANDS.
        arguments: The rest of the line; None: of this process.

    Returns:
        Exit code: 0 done; 1 failed, with the cause in one line; 2 wrong settings; 3 done, but samples were refused;
        130 stopped from the keyboard; of `submit` the job's own.
    """
    command = COMMANDS[name]
    try:
        settings = parse(name, list(sys.argv[1:] if arguments is None else arguments))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of libraries among themselves
            warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")  # few rows
            summary = importlib.import_module(command.module).run(settings)
    except ConfigError as error:
        return _complain(name, error, 2)
    except JobError as error:
        return _complain(name, error, error.code)
    except RlfsegError as error:
        return _complain(name, error, FAILED)
    except KeyboardInterrupt:
        print(f"rlfseg {name}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    if summary is None:  # nothing of ours to count
        return 0
    _show(summary)
    return REFUSED_SOME if summary.refused else 0


def parse(name: str, arguments: list[str]) -> Any:
    """A command's settings: defaults < `--config a.yaml` < `--config b.yaml` < flags, in the order on the line.

    Args:
        name: The command.
        arguments: What follows it on the line.

    Returns:
        An instance of the command's config class.

    Raises:
        ConfigError: A value is out of range: one line with field, value and what is allowed.
    """
    parsed = parser(name).parse_args(arguments)
    parsed.pop("config", None)
    try:
        # Not by the parser's `instantiate`: it makes nested settings by themselves; an error names only their own part
        return TypeAdapter(COMMANDS[name].settings).validate_python(parsed.as_dict())
    except ValidationError as error:
        raise ConfigError("; ".join(_field_error(e) for e in error.errors())) from error


def parser(name: str) -> ArgumentParser:
    """The parser of one command."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    command = COMMANDS[name]
    given = [f"{p} ..." if p in MANY else p for p in command.positional]
    parts = ["[--SETTING VALUE ...]", "--", *given] if name == "submit" else [*given, "[--SETTING VALUE ...]"]
    p = Parser(
        prog=f"rlfseg {name}",
        usage=f"%(prog)s {' '.join(parts)}",  # of 40 settings an error is hard to find below
        description=f"{command.what[0].upper()}{command.what[1:]}. In: {command.goes_in}. Out: {command.comes_out}. "
        f"Example: {command.example}",
    )
    p.add_argument(
        "--config", action=ActionConfigFile, help="YAML with any of the settings below; may be given several times"
    )
    p.add_class_arguments(command.settings, skip=set(command.positional))
    for setting, what in command.positional.items():
        many = MANY.get(setting)
        none: dict[str, Any] = {"default": []} if many == "*" else {}
        p.add_argument(setting, type=str, nargs=many, help=what, **none)
    return p


def _field_error(error: Any) -> str:
    field = ".".join(map(str, error["loc"]))
    return f"{field}: {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _complain(name: str, error: Exception, code: int) -> int:
    print(f"rlfseg {name}: {error}", file=sys.stderr)
    return code


def _overview() -> str:
    rows = "\n".join(f"  {name:10} {c.what}" for name, c in COMMANDS.items())
    title = f"rlfseg {__version__}: pixel-exact masks from words, by rectified flow in one step"
    return f"{title}\n\n{rows}\n\n`rlfseg COMMAND --help` teaches each."


def _show(summary: Any) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal can't show must not end a job that is done
        sys.stdout.reconfigure(errors="backslashreplace")
    rows = summary.rows_in - summary.resumed
    pace = summary.pace or (f"{rows / summary.seconds:.1f}/s" if summary.seconds else "")
    resumed = f", {summary.resumed} of them done before" if summary.resumed else ""
    where = f" on {summary.where}" if summary.where else ""
    print(
        f"{summary.name}: {summary.rows_in} in, {summary.rows_out} out, {len(summary.refused)} refused{resumed}; "
        f"{summary.seconds:.1f} s{', ' if pace else ''}{pace}{where}; {summary.out}"
    )
    for row_id, reason in list(summary.refused.items())[:20]:
        print(f"  refused {row_id}: {reason}")
    if len(summary.refused) > 20:
        print(f"  ... and {len(summary.refused) - 20} more")
    for figure, value in summary.figures.items():
        print(f"  {figure}: {value:.4f}" if isinstance(value, float) else f"  {figure}: {value}")
    for note in summary.notes:
        print(f"  {note}")

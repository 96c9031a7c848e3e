"""The command line: one verb a job. Imports stay inside the commands, so that help comes at once.

Every problem a user can act on is one line and a hint on stderr, and exit code 2 (130 after Ctrl-C);
SEAVLM_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from seavlm import __version__
from seavlm.errors import SeavlmError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from seavlm.recipe import Recipe

app = typer.Typer(
    help="Build, measure and run Southeast-Asian vision-language models on Gemma 3.",
    epilog='Start with:  seavlm ask picture.png "ນີ້ແມ່ນຫຍັງ?"   or   seavlm build recipes/demo.yaml',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(
    help="Pictures and samples: what a model is trained on and asked.", no_args_is_help=True
)
app.add_typer(data_app, name="data")
delta_app = typer.Typer(
    help="A tuned model as its base and a difference, in a fraction of the space.", no_args_is_help=True
)
app.add_typer(delta_app, name="delta")


def shielded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, its errors told in one line."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _say("stopped")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except typer.Exit:
            raise
        except Exception as error:
            if os.environ.get("SEAVLM_DEBUG"):
                raise
            if isinstance(error, SeavlmError):
                _say(f"error: {error}")
            elif isinstance(error, OSError | MemoryError):
                full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
                _say(f"error: {_one_line(error)}" + (". Make room, and run it again." if full else ""))
            else:
                _say(
                    f"error: {type(error).__name__}: {_one_line(error)}. This should not happen: "
                    "run again with SEAVLM_DEBUG=1 and report what it shows."
                )
            raise typer.Exit(2) from None

    return run


def verb(name: str | None = None, group: typer.Typer = app) -> Callable[[Callable[..., None]], None]:
    def add(command: Callable[..., None]) -> None:
        paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
        told = "\n\n".join(  # what is indented are examples: their lines stay
            text if text.startswith(" ") else " ".join(text.split("\n")) for text in paragraphs
        )
        group.command(name, help=told)(shielded(command))

    return add


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A directory, a .gguf file, a hub id, a built-in name, a merge recipe, a delta (DIR@0.3).",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="CPU: int8 (a quarter of the memory), or stored: a .gguf's weights as they are. GPU: int8, int4."
    ),
]
Speculate = Annotated[
    str | None,
    typer.Option(
        metavar="lookup|MODEL",
        help="Guess tokens ahead, for the same reply sooner: from the text so far, or by a smaller model.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; may be given often."),
]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, such as recipes/demo.yaml.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where the stages go. Default: out/NAME.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results.")]


# --- asking


@verb()
def ask(
    words: Annotated[
        list[str], typer.Argument(metavar="[PICTURE]... QUESTION", help="Pictures, then one question.")
    ],
    model: Model = "nano",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Seed = None,
    system: Annotated[str, typer.Option(help="What the model should know beforehand.")] = "",
    complete: Annotated[
        bool, typer.Option("--complete", help="Continue the text; what base models are for.")
    ] = False,
    pan_and_scan: Annotated[
        bool, typer.Option("--pan-and-scan", help="Look at crops of wide and tall pictures too.")
    ] = False,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Pictures may be http(s) addresses.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The answer and its figures as JSON.")] = False,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Write as it comes. Default: on a terminal.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    speculate: Speculate = None,
) -> None:
    """Ask a model about pictures, or about nothing but text.

    Examples:

      seavlm ask picture.png "ນີ້ແມ່ນຫຍັງ?"

      seavlm ask before.jpg after.jpg "What has changed?"  --model path/to/model

      cat picture.png | seavlm ask - "Ini apa?"   |   echo "Apa ini?" | seavlm ask picture.png -

      seavlm ask --complete --model gemma3-270m "The capital of Laos is"
    """
    *sources, question = words
    if words.count("-") > 1:
        raise SeavlmError(
            "standard input was asked for twice", hint="Give - once: a picture, or the question."
        )
    if question == "-":
        question = sys.stdin.read().strip()
        if not question:
            raise SeavlmError(
                "there is no question on standard input", hint='Try: echo "Apa ini?" | seavlm ask - '
            )
    elif len(words) == 1 and _looks_like_picture(question):
        raise SeavlmError(
            f"{question} is a picture, and nothing was asked about it",
            hint=f'Add a question: seavlm ask {question} "What is this?"',
        )
    pictures = [_picture(source, allow_urls) for source in sources]  # before the model, which takes longer

    vlm = _load(model, device, dtype, quantize, speculate)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    if complete:
        if pictures:
            raise SeavlmError(
                "--complete continues text and takes no pictures", hint="Leave one of them out."
            )
        reply = vlm.complete(question, **options)
    else:
        content = [*({"type": "image", "image": picture} for picture in pictures), _text(question)]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": [_text(system)]})
        options["pan_and_scan"] = pan_and_scan
        if (sys.stdout.isatty() if stream is None else stream) and not as_json:
            for piece in vlm.stream(messages, **options):
                print(piece, end="", flush=True)
            print()
            return
        reply = vlm.generate(messages, **options)
    if as_json:
        figures = {
            "model": model,
            "text": reply.text,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "new_tokens": len(reply.token_ids),
            "seconds": round(reply.seconds, 3),
        }
        print(json.dumps(figures, ensure_ascii=False))
    else:
        print(reply.text)


@verb()
def chat(
    model: Model = "nano",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy. Default: what the model's makers chose.")
    ] = None,
    seed: Seed = None,
    system: Annotated[str, typer.Option(help="What the model should know beforehand.")] = "",
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="/image may be given http(s) addresses.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    speculate: Speculate = None,
) -> None:
    """Talk with a model in the terminal; /help says what can be typed."""
    from seavlm.chat import converse

    vlm = _load(model, device, dtype, quantize, speculate)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    converse(vlm, system=system, load_picture=functools.partial(_picture, allow_urls=allow_urls), **options)


@verb()
def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="The questions, a JSON object a line.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The answers, as they come.")],
    model: Model = "nano",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    speculate: Speculate = None,
    quiet: Quiet = False,
) -> None:
    """Answer a file of questions, many at a time. Stopped or killed, the same command goes on.

    A row is {"prompt": "Apa ini?", "image": "a.jpg"}, or {"messages": [..]}, or one of OpenAI's batch format;
    "id" comes back with the answer. Paths are relative to the file's folder. Rows that cannot be answered go
    to OUT.bad.jsonl with the reason.

    Example:  seavlm batch questions.jsonl answers.jsonl --model gemma3-270m --quantize int8
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from seavlm.engine.batch import Progress as Figures
    from seavlm.engine.batch import bad_path, run_batch

    vlm = _load(model, device, dtype, quantize, speculate)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(out.name, total=None, told="")

        def show(figures: Figures) -> None:
            told = f"{figures.bad} set aside" if figures.bad else ""
            bar.update(task, total=figures.total, completed=figures.done, told=told)

        figures = run_batch(
            vlm,
            source,
            out,
            max_new_tokens=max_new_tokens,
            settings={"model": model, "dtype": dtype, "quantize": quantize},
            show=show,
            temperature=temperature,
            seed=seed,
        )
    _say(
        f"{out}: {figures.done - figures.bad} answers"
        + (f", {figures.before} rows from before" if figures.before else "")
        + (f"; {figures.bad} set aside in {bad_path(out)}" if figures.bad else "")
    )


# --- this machine


@verb()
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model reference.")] = "nano",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for bench.json and bench.png.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Each figure is the median of so many.")] = 3,
    quality: Annotated[
        bool, typer.Option("--quality", help="What rounding costs: KL divergence to float32 in 11 languages.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    quiet: Quiet = False,
) -> None:
    """Measure a model on this machine: prefill, decode, batch, vision, cold start, memory.

    Prompts are the Universal Declaration of Human Rights in eleven languages, cut to length; replies are
    greedy.

    Examples:

      seavlm bench nano

      seavlm bench gemma3-270m --quantize int8 --quality --out bench
    """
    from rich.table import Table

    from seavlm.engine import bench as measure
    from seavlm.weights.refs import resolve, unwritten

    given = {"device": device, "dtype": dtype, "quantize": quantize}
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    if not quiet:
        _say(f"measuring {model}; other work on this machine disturbs it")
    show = (lambda row: None) if quiet else lambda row: _say(f"{measure.label(row)}: {_figure(row)}")
    rows = measure.cold(model if unwritten(model) else str(resolve(model)), options, repeats=repeats)
    for row in rows:
        show(row)
    exact = _load(model, "cpu", "float32", None) if quality else None
    rows += measure.bench(
        _load(model, device, dtype, quantize), repeats=repeats, quality_against=exact, show=show
    )
    engine = " ".join(["seavlm", quantize or dtype])
    grid = Table(
        box=None, pad_edge=False, header_style="bold", title=f"{model}, {engine}", title_justify="left"
    )
    for head in ("work", "median", "smallest", "largest"):
        grid.add_column(head, justify="left" if head == "work" else "right")
    for row in rows:
        spread = (min(row["repeats"]), max(row["repeats"])) if len(row["repeats"]) > 1 else ()
        grid.add_row(measure.label(row), _figure(row), *(_figure({**row, "value": x}) for x in spread))
    _console().print(grid)
    if out is not None:
        machine = measure.machine()
        out.mkdir(parents=True, exist_ok=True)
        told = {"machine": machine, "model": model, "rows": [{"engine": engine, **row} for row in rows]}
        (out / "bench.json").write_text(
            json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        measure.plot(
            rows, f"{model}, {engine} ({machine['cpu']}, {machine['cores']} cores)", out / "bench.png"
        )


@verb()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> None:
    """What this machine has for running models, and what would make it faster."""
    from rich.table import Table

    from seavlm.doctor import advice, examine

    found = examine()
    if as_json:
        print(json.dumps({"found": found, "advice": advice(found)}, indent=1))
        return
    grid = Table(box=None, pad_edge=False, show_header=False)
    for name, value in found.items():
        grid.add_row(name, (", ".join(value) if isinstance(value, list) else str(value or "")) or "-")
    _console().print(grid)
    for line in advice(found):
        _console().print(f"\u2192 {line}")


@verb()
def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model reference.")] = "nano",
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of each request, prompt and reply together.")
    ] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    images: Annotated[int, typer.Option(min=0, help="Pictures in each request.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    quantize: Quantize = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="lora|full",
            help="Fine-tuning instead: --batch packed rows of --context tokens in a pass.",
        ),
    ] = None,
    lora_rank: Annotated[int, typer.Option(min=1, help="With --train lora.")] = 16,
    recompute: Annotated[
        bool,
        typer.Option("--recompute", help="With --train: layers are computed again in the backward pass."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes, as JSON.")] = False,
) -> None:
    """How much memory a model will take on this machine's CPU, before it is run, to within an eighth.

    The exit status is 1 if it does not fit, and what would make it fit is said.

    Examples:

      seavlm fit nano --images 2

      seavlm fit gemma3-270m --context 32768 --batch 8 --quantize int8

      seavlm fit gemma3-270m --train lora --context 512 --batch 8 --dtype bfloat16
    """
    from dataclasses import asdict

    from rich.table import Table

    from seavlm.fit import fit as predict
    from seavlm.fit import what_would_fit
    from seavlm.weights.refs import resolve

    path = resolve(model)
    given: dict[str, Any] = {
        "context": context,
        "batch": batch,
        "images": images,
        "dtype": dtype,
        "quantize": quantize,
        "train": train,
        "lora_rank": lora_rank,
        "recompute": recompute,
    }
    found = predict(path, **given)
    if as_json:
        print(json.dumps(asdict(found) | {"peak": found.peak, "fits": found.fits}, indent=1))
    else:
        grid = Table(box=None, pad_edge=False, show_header=False)
        rows = {**found.parts, "together": found.running, "most while loading": found.loading}
        for name, size in {**rows, "peak": found.peak, "free here": found.available}.items():
            grid.add_row(name, f"{size / 2**20:,.0f} MiB")
        _console().print(grid)
        if not found.fits:
            _console().print("It does not fit.")
            for line in what_would_fit(path, **given):
                _console().print(f"\u2192 {line}")
    if not found.fits:
        raise typer.Exit(1)


# --- serving


@verb()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Model references; several are told apart by these names."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; beyond this machine only with a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SEAVLM_API_KEY", help="Asked of every request. Better in the environment."),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="A YAML file of keys, each with its own limits, instead of --api-key."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and reply together. Default: the model's.")
    ] = None,
    max_images: Annotated[int, typer.Option(min=0, help="Pictures in a request.")] = 16,
    max_sequences: Annotated[int, typer.Option(min=1, help="Replies written at once.")] = 64,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are told 429.")] = 256,
    cache_tokens: Annotated[
        int | None, typer.Option(min=64, help="Tokens that the KV cache holds, of all requests together.")
    ] = None,
    allow_image_urls: Annotated[
        bool, typer.Option("--allow-image-urls", help="Fetch pictures from the web (public addresses only).")
    ] = False,
    media_root: Annotated[
        Path | None,
        typer.Option(help="A folder: pictures may be file:///NAME below it.", exists=True, file_okay=False),
    ] = None,
    guard: Annotated[
        Path | None,
        typer.Option(help="A YAML file of what to refuse (docs/guard.yaml is one), asked and answered."),
    ] = None,
    backend: Annotated[
        Literal["engine", "vllm"],
        typer.Option(help="What computes: seavlm's engine, or a vLLM server behind this one."),
    ] = "engine",
    vllm_url: Annotated[
        str | None,
        typer.Option(
            help="A vLLM that runs, http://HOST:PORT (its key: SEAVLM_VLLM_API_KEY). Else one is started."
        ),
    ] = None,
    vllm_args: Annotated[
        str, typer.Option(help="For the vLLM that is started, such as '--tensor-parallel-size 4'.")
    ] = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    speculate: Speculate = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it, and a chat page at /.

    Ctrl-C or SIGTERM ends it when the replies under way are done, after 30 seconds at the latest.

    Examples:

      seavlm serve nano

      SEAVLM_API_KEY=secret seavlm serve gemma3-270m --quantize int8 --host 0.0.0.0

      seavlm serve out/tuned out/delta@0.3 merge.yaml        (side by side in the chat page)

      seavlm serve aisingapore/Gemma-SEA-LION-v4-27B-VL --backend vllm --vllm-args '--tensor-parallel-size 2'
    """
    if api_key and keys:
        raise SeavlmError("--api-key and --keys are alternatives", hint="Give one of them.")
    if not _is_loopback(host) and not (api_key or keys):
        raise SeavlmError(
            f"{host} can be reached from other machines, and there is no API key",
            hint="Give SEAVLM_API_KEY or --keys, or leave --host out.",
        )
    from seavlm.serve.app import create_app
    from seavlm.serve.backend import Backend
    from seavlm.serve.engine_backend import EngineBackend
    from seavlm.serve.guard import Guards
    from seavlm.serve.limits import Keys
    from seavlm.serve.run import run
    from seavlm.serve.server import Settings
    from seavlm.serve.tracing import Tracing

    settings = Settings(
        keys=Keys.read(keys) if keys else Keys.one(api_key) if api_key else Keys(),
        max_images=max_images,
        allow_urls=allow_image_urls,
        media_root=media_root,
        guards=Guards() if guard is None else Guards.read(guard),
        tracing=Tracing.from_environment(),
    )
    names = models or ["nano"]
    backends: list[Backend] = []
    if backend == "vllm":
        from seavlm.serve.vllm_backend import VllmBackend
        from seavlm.weights.refs import resolve

        if device != "auto" or quantize or speculate or cache_tokens:
            raise SeavlmError(
                "--device, --quantize, --speculate and --cache-tokens are of seavlm's engine",
                hint="For vLLM give --vllm-args.",
            )
        if len(names) > 1:
            raise SeavlmError("a vLLM serves one model", hint="Start a server for each.")
        backends.append(
            VllmBackend(
                names[0],
                url=vllm_url,
                key=os.environ.get("SEAVLM_VLLM_API_KEY"),
                weights=None if vllm_url else resolve(names[0]),
                arguments=shlex.split(vllm_args),
                dtype=dtype,
                max_sequences=max_sequences,
                max_queue=max_queue,
                max_tokens=max_model_len,
            )
        )
    elif vllm_url or vllm_args:
        raise SeavlmError("--vllm-url and --vllm-args go with --backend vllm", hint="Add it.")
    else:
        options = {"max_sequences": max_sequences, "cache_tokens": cache_tokens}
        for name in names:
            vlm = _load(name, device, dtype, quantize, speculate, **options)
            backends.append(EngineBackend(vlm, max_queue=max_queue, max_tokens=max_model_len))
    run(create_app(backends, settings), host, port)


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- the recipe


@verb()
def build(
    recipe: RecipeFile,
    overrides: Set = None,
    out: Out = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run every stage, also those that have not changed.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Make a model: data, fine-tuning, merge sweep, evaluation, card.

    A stage whose inputs did not change is not run again, and a run that was stopped goes on where it was.

    Examples:

      seavlm build recipes/demo.yaml

      seavlm build recipes/nano.yaml --set train.lr=2e-5 --set "merge.betas=[0, 0.1, 1]" --out runs/a
    """
    from seavlm.build import build as run

    run(_recipe(recipe, overrides), out, force=force, progress=not quiet)


def _stage(
    name: str, recipe: Path, overrides: list[str] | None, out: Path | None, force: bool, quiet: bool
) -> None:
    from seavlm.build import run_stage, show

    settings = _recipe(recipe, overrides)
    run_stage(name, settings, out, force=force, progress=not quiet)
    show(name, settings, out)


Force = Annotated[bool, typer.Option("--force", help="Run it even if nothing has changed.")]


@verb("samples", data_app)
def data_samples(
    recipe: RecipeFile, overrides: Set = None, out: Out = None, force: Force = False, quiet: Quiet = False
) -> None:
    """Write the recipe's samples: train.parquet, dev.parquet and eval.parquet. (The stage "data".)

    The rows are messages and images as `datasets` opens them and TRL trains on them.
    """
    _stage("data", recipe, overrides, out, force, quiet)


@verb("pictures", data_app)
def data_pictures(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")] = Path("out/pictures"),
    packages: Annotated[
        Path | None, typer.Option(help="A folder with the npm archives. Default: they are fetched by npm.")
    ] = None,
) -> None:
    """Make the built-in picture set anew from its npm packages: drawings, flags, names in 11 languages."""
    from seavlm.data.pictures import build as build_pictures

    figures = build_pictures(out, packages)
    print(f"{out}: " + ", ".join(f"{value} {name}" for name, value in figures.items()))


@verb()
def init(
    recipe: RecipeFile, overrides: Set = None, out: Out = None, force: Force = False, quiet: Quiet = False
) -> None:
    """Make a base model from nothing, for recipes with a section "init".

    Example:  seavlm init recipes/nano-base.yaml
    """
    _stage("init", recipe, overrides, out, force, quiet)


@verb()
def train(
    recipe: RecipeFile, overrides: Set = None, out: Out = None, force: Force = False, quiet: Quiet = False
) -> None:
    """Fine-tune the recipe's base on its samples. Stopped or killed, the same command goes on.

    Example:  seavlm train recipes/demo.yaml --set train.steps=50
    """
    _stage("train", recipe, overrides, out, force, quiet)


@verb()
def merge(
    what: Annotated[
        list[str], typer.Argument(metavar="RECIPE | REGIONAL GLOBAL", help="A recipe, or two models.")
    ],
    beta: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the regional model (with two models).")
    ] = None,
    overrides: Set = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The merged model's folder. Of a build: where its stages go (out/NAME)."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as the parents.")] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest weight file, in GB.")] = 5.0,
    input_hashes: Annotated[
        bool, typer.Option(help="Note the SHA-256 of all parents, which takes as long again as the merge.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be read and written, and in what memory.")
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Merge models: by a recipe (linear, slerp, ties and twelve more methods), or two with a beta.

    Two models: theta = beta * regional + (1 - beta) * global. A merge recipe has regional, global and beta
    (one, or one for each module), or mergekit's keys: merge_method, models, slices or modules, base_model,
    parameters (by filter and by layer), dtype, tokenizer_source or tokenizer, chat_template. With a recipe of
    a build the best beta is searched for (as `seavlm sweep` does). Killed, the same command goes on.

    Examples:

      seavlm merge nano nano-global --beta 0.1 --out merged

      seavlm merge docs/merge.yaml --out merged --dry-run

      seavlm merge recipes/demo.yaml
    """
    if len(what) == 1 and beta is None:
        from seavlm.recipe import is_merge, read_mapping

        path = Path(what[0])
        raw = read_mapping(path, overrides or ())
        if not is_merge(raw):
            return _stage("merge", path, overrides, out, force, quiet)
    elif len(what) == 2 and beta is not None:
        raw = {"regional": what[0], "global": what[1], "beta": beta}
    else:
        raise SeavlmError(
            "two models are merged with a beta", hint="seavlm merge REGIONAL GLOBAL --beta 0.1 --out DIR."
        )
    if out is None:
        raise SeavlmError("the merged model has no place to go", hint="Add --out DIR.")
    from seavlm.merge import plan as planning
    from seavlm.merge import stream
    from seavlm.merge.unwritten import open_parent

    plan = planning.from_recipe(raw, open_parent, dtype)
    ahead = stream.outlook(plan, out, shard_gb * 1e9)
    for note in ahead["notes"]:
        _say(f"note: {note}")
    if dry_run:
        gb = {
            key: f"{ahead[key] / 1e9:,.2f} GB"
            for key in ("read", "written", "free", "largest_tensor", "memory")
        }
        print(f"{ahead['tensors']} tensors, {ahead['parameters']:,} parameters, {ahead['dtype']}")
        print(f"methods: {', '.join(ahead['methods'])}")
        again = (
            "" if set(ahead["methods"]) <= {"linear", "passthrough", "task_arithmetic"} else ", several times"
        )
        print(f"read:    {gb['read']} from {len(plan.places)} models{again}")
        print(f"written: {gb['written']} in {ahead['files']} files; {gb['free']} are free at {out}")
        print(f"memory:  {gb['memory']} besides Python's; the largest tensor has {gb['largest_tensor']}")
        if ahead["free"] < ahead["written"]:
            raise SeavlmError("the disk has too little room for it", hint="Make room, or give another --out.")
        return
    with _transfer(ahead["written"], quiet) as told:
        figures = stream.run(plan, out, shard_bytes=shard_gb * 1e9, hash_inputs=input_hashes, told=told)
    print(f"{out}: {figures['tensors']} tensors, {figures['parameters']:,} parameters, {figures['dtype']}")
    if not quiet and figures["rounding_max"]:
        print(f"rounding: {figures['rounding_mean']:.1e} on average, {figures['rounding_max']:.1e} at most")


@contextlib.contextmanager
def _transfer(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes with their rate and the time that is left; takes how many more are done."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = _console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda more: bar.advance(task, more)


@verb()
def sweep(
    regional: Annotated[str, typer.Argument(metavar="REGIONAL", help="The fine-tuned model.")],
    world: Annotated[str, typer.Argument(metavar="GLOBAL", help="The model it was tuned from.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the results go.")],
    suite: Annotated[
        str | None, typer.Option("--suite", "-s", help="What is asked: a name, or a YAML file.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A suite's data set; or dev.parquet, or the folder that holds it.")
    ] = None,
    betas: Annotated[str, typer.Option(help="Shares of the regional model, with commas.")] = (
        "0,0.1,0.2,0.3,0.5,0.7,0.9,1"
    ),
    modules: Annotated[
        str,
        typer.Option(
            help="With a share of their own: vision (vision_tower, projector), attention, mlp, embeddings, "
            "norms, layers 0-5, mlp layers 0-5; with commas. The first that fits a tensor counts; the rest "
            "has one too."
        ),
    ] = "",
    trials: Annotated[
        int,
        typer.Option(min=0, help="Betas proposed by optuna, after the grid. 0: one module after the other."),
    ] = 0,
    alpha: Annotated[
        float, typer.Option(min=0, max=1, help="Weight of the global score (English and Mandarin).")
    ] = 0.43,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LANGUAGE=SHARE",
            help="What a merge must keep of the global parent's accuracy: en=0.9. May be given often.",
        ),
    ] = None,
    confirm: Annotated[
        float, typer.Option(min=0.1, max=0.9, help="Share of the concepts kept for the verdict.")
    ] = 0.5,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many questions a task and language.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be given often.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest reply.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    seed: Annotated[int, typer.Option(help="Of the rounds, the resamples and the trials.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Find how much of the fine-tuned model to keep, for each module.

    theta = beta * regional + (1 - beta) * global, made in memory; no merge is
    written. A grid of one beta for all comes first, then the modules. What
    counts is alpha * accuracy in English and Mandarin + (1 - alpha) * accuracy
    in the other nine languages. Merges race: who is surely behind, or below a
    floor, is asked no more.

    The verdict comes from concepts that the search did not ask about
    (--confirm), against both parents. What is inside the noise is no win; how
    many more questions would settle it is told. Ask more (--limit) into the
    same folder: replies are kept, and each further verdict is held to a wider
    interval, for it is one more chance of luck. Killed, or with more trials,
    the same command goes on.

    In --out: sweep.json, sweep.csv, sweep.png (scores over one beta),
    pareto.png, best.yaml. For energy and carbon see
    seavlm card --help.

    Examples:

      seavlm sweep out/demo/train/model nano-global --data out/demo/data -o s

      seavlm sweep nano nano-global -s pictures --modules attention,mlp -o s

      seavlm sweep nano nano-global -s offline --trials 30 --floor en=0.9 -o s

      seavlm merge s/best.yaml --out merged
    """
    from seavlm.build import sweep_models
    from seavlm.merge.show import table

    floors = {}
    for given in floor or []:
        code, _, share = given.partition("=")
        floors[code] = _share(share, given, "Write en=0.9.")
    report = sweep_models(
        regional,
        world,
        out,
        suite=suite,
        data=data,
        tasks=task,
        limit=limit,
        betas=[_share(part, part, "Shares are between 0 and 1: 0,0.1,0.3") for part in betas.split(",")],
        modules=[word.strip() for word in modules.split(",") if word.strip()],
        trials=trials,
        alpha=alpha,
        floors=floors,
        confirm=confirm,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        quantize=quantize,
        seed=seed,
        tell=(lambda line: None) if quiet else _say,
    )
    _console().print(table(report))
    print(report["verdict"])
    print(f"{out / 'best.yaml'}, {out / 'pareto.png'}")


def _share(text: str, given: str, hint: str) -> float:
    try:
        number = float(text)
        if 0 <= number <= 1:
            return number
    except ValueError:
        pass
    raise SeavlmError(f"{given!r} is no share", hint=hint)


@verb("make", delta_app)
def delta_make(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that TUNED was tuned from.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tuned model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")],
    lossy: Annotated[
        str | None, typer.Option(help='"int8" or "rank N". Default: exact, bit for bit.')
    ] = None,
) -> None:
    """Write how a fine-tuned model differs from its base, which is remembered by name or by path.

    Wherever a model is asked for, DIR@0.3 then is the merge at beta 0.3, made while it loads, and DIR the
    tuned model.

    Examples:

      seavlm delta make nano-global out/demo/train/model --out out/delta

      seavlm ask docs/pineapple.png "Apa ini?" --model out/delta@0.3

      seavlm serve out/delta@0.1 out/delta@0.5
    """
    from seavlm.merge.delta import make_delta

    figures = make_delta(base, tuned, out, lossy=lossy)
    error = f", relative error {figures['relative_error']:.2g}" if lossy else ", exact"
    print(f"{out}: {figures['bytes']:,} bytes, {figures['share']:.1%} of the tuned model{error}")


@verb("apply", delta_app)
def delta_apply(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that the delta was made from.")],
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="The delta's folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the model goes.")],
    beta: Annotated[float, typer.Option(min=0, max=1, help="Share of the tuned model.")] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as the tuned.")] = None,
) -> None:
    """Write the model of a delta: beta * tuned + (1 - beta) * base, as `seavlm merge` would.

    Example:  seavlm delta apply nano-global out/delta --beta 0.1 --out merged
    """
    from seavlm.merge.delta import apply_delta

    figures = apply_delta(base, delta, out, beta=beta, dtype=dtype)
    print(f"{out}: {figures['tensors']} tensors, {figures['parameters']:,} parameters, {figures['dtype']}")


@verb("base", delta_app)
def delta_base(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="The delta's folder.")],
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model that it was made from: where it is now.")
    ],
) -> None:
    """Say where a delta's base is, once it is no more where it was.

    Example:  seavlm delta base out/delta models/global
    """
    from seavlm.merge.delta import set_base

    set_base(delta, base)
    print(f"{delta}: its base is {base}")


@verb("eval")
def eval_(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE | MODEL | URL", help="A recipe, a model, an endpoint's /v1.")
    ] = "",
    suite: Annotated[
        str | None, typer.Option("--suite", "-s", help="What is asked: a name, or a YAML file.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A suite's data set; or eval.parquet, or the folder that holds it.")
    ] = None,
    overrides: Set = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The run's folder. Of a recipe: where its stages go. Default: out/NAME."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many questions a task and language.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be given often.")] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Only this language; may be given often.")
    ] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Ask once more without pictures: guessing, and reply language.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest reply.")] = None,
    name: Annotated[str, typer.Option(help="The model at the endpoint, or what to call this one.")] = "",
    concurrency: Annotated[int, typer.Option(min=1, max=512, help="Requests at once to an endpoint.")] = 8,
    price: Annotated[
        str | None, typer.Option(metavar="IN,OUT", help="Of a million tokens, to count what it cost.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Results of another model on the same questions, to compare with.")
    ] = None,
    rescore: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Judge the replies of a run again; nothing is asked.")
    ] = None,
    lmms_eval: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the replies as lmms-eval logs them, too.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A model that reads all replies as well: an endpoint's /v1."),
    ] = None,
    judge_model: Annotated[str, typer.Option(metavar="NAME", help="The judge's name at its endpoint.")] = "",
    judge_pictures: Annotated[
        bool, typer.Option("--judge-pictures", help="Show the judge the pictures, too.")
    ] = False,
    judge_price: Annotated[
        str | None, typer.Option(metavar="IN,OUT", help="Of a million of the judge's tokens.")
    ] = None,
    list_suites: Annotated[
        bool, typer.Option("--list", help="The suites: languages, size, licence, where to get the data.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Ask a model questions and judge its replies, by task and language.

    With a recipe: the global parent, the fine-tuned and the merged model, on the same questions. With --out
    every question, reply and verdict is kept: stopped or killed, the same command goes on. A suite of your
    own: docs/suite.yaml. An endpoint's key is SEAVLM_API_KEY. For energy and carbon see seavlm card --help.

    With --judge another model says of each reply whether it is right. That stands beside the automatic score
    and changes none: how far the two agree, by task and language, and where they do not. Its key is
    SEAVLM_JUDGE_KEY. It can also judge a run that has been made (--rescore).

    Examples:

      seavlm eval nano --suite offline --out out/nano

      seavlm eval merged --suite offline --out out/merged --against out/nano

      seavlm eval http://127.0.0.1:8000/v1 --suite pictures --out out/served

      seavlm eval path/to/model --suite xm3600 --data path/to/xm3600 --blind

      seavlm eval nano --suite docs/suite.yaml --out out/mine

      seavlm eval --rescore out/nano

      seavlm eval --rescore out/nano --judge https://host/v1 --judge-model NAME

      seavlm eval recipes/demo.yaml
    """
    from seavlm.evals import run, scores, show, suites
    from seavlm.recipe import is_merge, read_mapping

    if list_suites:
        for name in [suite] if suite else suites.names():
            print(suites.described(suites.load_suite(name)))
        return
    if judge is None and (judge_model or judge_pictures or judge_price):
        raise SeavlmError("there is no judge", hint="Give its endpoint: --judge URL.")
    a_recipe = what.endswith((".yaml", ".yml")) and not is_merge(read_mapping(what))
    if judge is not None and rescore is None and (out is None or a_recipe):
        raise SeavlmError(
            "a judge reads the replies of a run that is kept",
            hint="Give --out DIR, or a run that has been made: --rescore DIR.",
        )
    if a_recipe:
        return _stage("eval", Path(what), overrides, out, force, quiet)
    for given in (price, judge_price):
        if given is not None:
            scores.cost(given, {"prompt_tokens": 0, "new_tokens": 0})  # said before anything is spent
    other = None if against is None else run.rescore(against)  # a wrong place is said before the run
    if lmms_eval is not None and lmms_eval.exists() and not lmms_eval.is_dir():
        raise SeavlmError(f"{lmms_eval} is a file", hint="Choose a directory to write to.")
    if rescore is not None:
        if what or limit or task or language or blind:
            raise SeavlmError(
                "--rescore judges all replies of a run that has been made, and asks nothing",
                hint="Leave out the model, --limit, --task, --language and --blind.",
            )
        folder: Path | None = rescore
        results = run.rewrite(rescore, price=price)
    elif not what or (data is None and suite is None):
        raise SeavlmError(
            "a model needs questions" if what else "there is nothing to evaluate",
            hint="seavlm eval nano --suite offline, or --data out/demo/data; seavlm eval --list.",
        )
    else:
        from seavlm.build import evaluate_model

        results = evaluate_model(
            what,
            data,
            out,
            suite=suite,
            tasks=task,
            languages=language,
            limit=limit,
            blind=blind,
            max_new_tokens=max_new_tokens,
            name=name,
            key=os.environ.get("SEAVLM_API_KEY", ""),
            concurrency=concurrency,
            price=price,
            device=device,
            dtype=dtype,
            quantize=quantize,
            progress=not quiet,
            replace=force,
            tell=(lambda line: None) if quiet else _say,
        )
        folder = out
    console = _console()
    console.print(show.table(results, console.width))
    used = results.usage
    _say(_spent(used, results.about.get("price")))
    for remark in show.diagnosis(results):
        _say(remark)
    if folder is not None:
        from seavlm.evals import judge as judging

        if judge is None:
            opinions = judging.refresh(results, folder)
        else:
            from seavlm.build import judge_pictures as pictures_of

            shown = pictures_of(results, suite, data) if judge_pictures else None
            opinions = [
                judging.judged(
                    results,
                    folder,
                    judge,
                    model=judge_model,
                    key=os.environ.get("SEAVLM_JUDGE_KEY", ""),
                    pictures=shown,
                    concurrency=concurrency,
                    progress=not quiet,
                )
            ]
        for found in opinions:
            for grid in show.judge_table(found):
                _console().print(grid)
            for remark in show.judge_remarks(found):
                _say(remark)
            _say(f"the judge: {_spent(found['usage'], judge_price)}")
    if against is not None and other is not None:
        compared = scores.comparison(results, other)
        texts = [place / "retention.json" for place in (folder, against) if place is not None]
        if len(texts) == 2 and all(path.is_file() for path in texts):
            ours, theirs = (json.loads(path.read_text(encoding="utf-8")) for path in texts)
            compared["retention"] = scores.retention_change(ours, theirs)
        if folder is not None:
            (folder / "comparison.json").write_text(json.dumps(compared, indent=1) + "\n", encoding="utf-8")
        for group, gap in compared["groups"].items():
            verdict = "differs" if gap["significant"] else f"inside the noise ({gap['detectable'] * 100:.1f})"
            interval = f"{gap['mean'] * 100:+.1f} [{gap['low'] * 100:+.1f} to {gap['high'] * 100:+.1f}]"
            holm = "" if gap["p_holm"] is None else f"Holm {gap['p_holm']:.3f}"
            print(f"{group:<9} {interval:<26} p {gap['p']:.3f}  {holm:<10}  {verdict}")
        _say("a language differs where Holm's p, for all languages at once, is below 0.05")
        for code, text in compared.get("retention", {}).items():
            interval = f"{text['change']:+.2f} [{text['low']:+.2f} to {text['high']:+.2f}]"
            print(f"{code:<9} {interval:<26} bits per character of plain text, now {text['a']:.2f}")
    if lmms_eval is not None:
        from seavlm.evals.export import to_lmms_eval

        _say(f"{lmms_eval}: {len(to_lmms_eval(results, lmms_eval))} files")


def _spent(used: dict[str, int], price: str | None) -> str:
    from seavlm.evals import scores

    line = f"{used['prompt_tokens']:,} tokens read, {used['new_tokens']:,} written"
    if price:
        line += f", costs {scores.cost(price, used):,.4f}"
    if unknown := used.get("uncounted"):
        line += f"; without those of {unknown:,} replies, of which the endpoint does not tell the tokens"
    return line


@verb()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders of `seavlm eval`; also of a sweep, a stage or a build."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("report.html"),
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it as Markdown, too, without pictures.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the facts as JSON, too.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Examples shown for each language.")] = 6,
) -> None:
    """Write what runs have found as one HTML file that needs no network: scores, differences, examples.

    Each run is compared with the first that was asked the same questions. A sweep's folder adds the merges,
    and a stage's its energy and carbon.

    Examples:

      seavlm report out/nano --out report.html

      seavlm report out/nano out/merged out/sweep --json report.json
    """
    from seavlm import manifest
    from seavlm.evals import page
    from seavlm.evals import report as reports

    made = reports.gather(runs, examples=examples)
    manifest.write_text(out, page.page(made))
    if markdown is not None:
        manifest.write_text(markdown, reports.markdown(made.facts))
    if as_json is not None:
        manifest.write_json(as_json, made.facts)
    print(f"{out}: {len(made.facts['runs'])} runs, {out.stat().st_size:,} bytes")


@verb()
def card(
    what: Annotated[str, typer.Argument(metavar="RECIPE | MODEL", help="A build's recipe, or a model.")],
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Of a model: folders of its stages, sweeps and evaluations."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Of a recipe, any key. Of a model: name, title, description, license, authors, limitations.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Of a model: a .md file, or a folder. Default: the model's README.md."
        ),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write the model card from what stages and runs have recorded.

    A model's folder tells how it was made; its parents and data are found by their hashes where they lie on
    this machine. What else is given, such as evaluations, must be of the model or of its parents.

    Energy and carbon are what the runs have noted (hours x watts x PUE x intensity). Before a run,
    SEAVLM_REGION (thailand, asia-southeast1, ...), SEAVLM_WATTS (a number, '8 x H200' for their design power,
    or codecarbon) and SEAVLM_PUE say where the machine stands and what it draws; without watts, they are
    measured if they can be.

    Examples:

      seavlm card recipes/demo.yaml

      seavlm card merged out/sweep out/merged out/nano --set license=gemma

      seavlm card nano out/nano --out nano.md
    """
    if what.endswith((".yaml", ".yml")):
        if runs:
            raise SeavlmError("a recipe names its stages itself", hint="Give a model's folder and its runs.")
        return _stage("card", Path(what), overrides, out, force, quiet)
    import yaml

    from seavlm.build import write_card

    settings = {}
    for given in overrides or []:
        key, eq, value = given.removeprefix("card.").partition("=")
        if not eq:
            raise SeavlmError(f"{given!r} is not a setting", hint="Write KEY=VALUE: --set license=gemma")
        settings[key] = yaml.safe_load(value)
    written, remarks = write_card(what, runs or [], out, settings=settings, force=force)
    for remark in remarks:
        _say(remark)
    print(written)


# --- models


@verb()
def models() -> None:
    """List the models that have a name; --model also takes folders, .gguf files and hub ids."""
    from rich.table import Table

    from seavlm.weights.refs import builtin_models

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("name", "size", "state", "what it is"):
        grid.add_column(head)
    for entry in builtin_models():
        grid.add_row(entry.name, entry.size, entry.state, entry.about)
    _console().print(grid)


@verb()
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model reference.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    weights: Annotated[
        str, typer.Option(help="int8: round them. stored: keep the bits of a .gguf file as they are.")
    ] = "int8",
    small_head: Annotated[
        bool,
        typer.Option(
            help="The output head in 5.7 bits instead of 8.5, fitted to what the model writes when it is "
            "given names of things in 11 languages (a minute). Worth it for small models, whose head is most "
            "of what a token costs.",
        ),
    ] = False,
) -> None:
    """Write a model for the CPU's kernels: mapped, it loads at once, without PyTorch if it only reads text.

    Examples:

      seavlm quantize gemma3-270m out/small --weights stored --small-head

      seavlm ask --model out/small --complete "The capital of Laos is"
    """
    from seavlm.engine.quantize import save_quantized
    from seavlm.weights.refs import resolve

    if weights not in ("int8", "stored"):
        raise SeavlmError(f"unknown weights {weights!r}", hint="Use int8 or stored.")
    with _console(stderr=True).status(f"quantising {model}") as status:
        size = save_quantized(
            resolve(model),
            out,
            weights,
            small_head=_some_names() if small_head else (),
            progress=lambda what: status.update(f"quantising {model}: {what}"),
        )
    print(f"{out}: {size / 1e6:,.1f} MB")


@verb()
def trim(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model reference.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    corpus: Annotated[
        list[Path], typer.Option("--corpus", "-c", help="Text files (a line a text) or samples (.parquet).")
    ],
) -> None:
    """Cut a model's vocabulary down to what a corpus needs, tokenizer and embedding together.

    Texts of the corpus tokenise as before; any other text still goes through, byte by byte.

    Example:  seavlm trim gemma3-270m out/small --corpus lao.txt --corpus out/demo/data/train.parquet
    """
    from seavlm.trim import trim_checkpoint
    from seavlm.weights.refs import resolve

    kept = trim_checkpoint(resolve(model), out, _texts(corpus))
    print(f"{out}: {len(kept):,} tokens kept")


@verb()
def version() -> None:
    """Print the versions of seavlm, Python and torch."""
    import platform
    from importlib.metadata import version as version_of

    print(f"seavlm {__version__}  (Python {platform.python_version()}, torch {version_of('torch')})")


# --- small things


def _some_names(each: int = 16) -> list[str]:
    """Of every language so many texts, each a list of four things."""
    import random

    from seavlm.data.pictures import load_pictures
    from seavlm.text.language import LANGUAGES

    chance, concepts = random.Random(0), load_pictures().select(None)
    return [
        "\n".join(concept.names[code] for concept in chance.sample(concepts, 4)) + "\n"
        for code in LANGUAGES
        for _ in range(each)
    ]


def _recipe(path: Path, overrides: list[str] | None) -> Recipe:
    from seavlm.recipe import load_recipe

    return load_recipe(path, overrides or ())


def _load(
    model: str, device: str, dtype: str, quantize: str | None, speculate: str | None = None, **engine: Any
) -> Any:
    """The model, with a sign of life on a terminal's stderr while it loads. engine: options of `Engine`."""
    options: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize, **engine}
    show = sys.stderr.isatty()
    with _console(stderr=True).status(f"loading {model}") if show else contextlib.nullcontext():
        from seavlm.engine.vlm import load

        return load(model, **options, speculate=speculate or False)


def _picture(source: str, allow_urls: bool) -> Any:
    """A decoded picture from a path, an address, or standard input ("-")."""
    from seavlm.image.decode import decode, load_part

    if source == "-":
        return decode(sys.stdin.buffer.read())
    if source.lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise SeavlmError("fetching pictures from the web is off", hint="Add --allow-urls.")
        return load_part({"type": "image", "url": source}, allow_urls=True)
    path = Path(source).expanduser()
    if not path.exists():
        beside = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = (
            nearest(str(path), beside).strip()
            or "Give the path of a picture; the question comes last, in quotes."
        )
        raise SeavlmError(f"there is no file {source}", hint=hint)
    return decode(path)


def _texts(corpus: list[Path]) -> Iterator[str]:
    """The texts of a corpus: lines of text files, all texts of samples."""
    for path in corpus:
        if path.suffix == ".parquet":
            from seavlm.data.samples import read_samples

            for row in read_samples(path):
                for message in row["messages"]:
                    yield from (part["text"] for part in message["content"] if part["type"] == "text")
        else:
            try:
                with path.open(encoding="utf-8") as lines:
                    yield from (line.rstrip("\n") for line in lines)
            except (OSError, UnicodeDecodeError) as error:
                raise SeavlmError(
                    f"{path} cannot be read as UTF-8 text ({error})", hint="Check it."
                ) from None


def _looks_like_picture(word: str) -> bool:
    try:
        return Path(word).is_file() or word.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".gif"))
    except OSError:  # longer than a path can be: a question
        return False


def _figure(row: dict[str, Any]) -> str:
    """A measured value with its unit, to three figures or whole."""
    value = row["value"]
    return f"{value:,.0f} {row['unit']}" if value >= 100 else f"{value:.3g} {row['unit']}"


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _say(line: str) -> None:
    print(f"seavlm: {line}", file=sys.stderr, flush=True)


def main() -> None:
    """The entry point of the command `seavlm`."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # answers are in eleven languages, whatever the locale says
            output.reconfigure(encoding="utf-8", errors="replace")
    app(prog_name="seavlm")


if __name__ == "__main__":
    main()

"""The program ``karikomi``: its verbs and their exit codes.

A verb's module is imported only when the verb is called, so that ``karikomi --help`` costs next to
nothing. Exit codes: 0 done or held, 1 an error in one line, 2 bad usage, 3 undecided or not run, 4 a budget or
gate that was missed, 130 interrupted. With ``--json`` an error is also one JSON object on stdout: ``error`` (the
line), ``kind`` (its class), ``exit_code``.
"""

from __future__ import annotations

import errno
import importlib
import json
from typing import Any

import click

from karikomi import __version__
from karikomi.errors import KarikomiError, suggest

HELD, ERROR, USAGE, UNDECIDED, MISSED, INTERRUPTED = 0, 1, 2, 3, 4, 130
"""The exit codes."""

VERBS = {
    "compress": "Train, prune, quantize and pack a network; the main job.",
    "sweep": "Train at many clip limits and sparsities: table and plot.",
    "advise": "Read a recorded run: a clip limit, what exploded first, and why.",
    "audit": "Show what a compressed network does differently.",
    "pack": "Store a file of arrays as a small .karikomi file.",
    "unpack": "Turn a .karikomi file back into safetensors.",
    "export": "Write the network of a .karikomi file as an ONNX file.",
    "inspect": "Show what each tensor of a .karikomi file costs.",
    "list": "List rules, scores, schedules and tasks with formula and source.",
}

RESUMABLE = ("compress", "sweep")


class Verbs(click.Group):
    """The group of all verbs: loads them late, and turns errors into a line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of a typical workflow."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a verb, importing its module."""
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f"karikomi.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or end with the nearest names."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            ctx.fail(f"there is no verb {args[0]!r}; {suggest(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note whether an error must be JSON: the arguments that would tell may be what is wrong."""
        options = args[: args.index("--")] if "--" in args else args
        ctx.meta[_AS_JSON] = "--json" in options
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            _print_json(ctx, error, error.format_message(), error.exit_code)
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs without importing them."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; errors of karikomi end in one line, all others in a traceback."""
        try:
            return super().invoke(ctx)
        except KarikomiError as error:
            from karikomi.report.terminal import printable

            _end(ctx, error, printable(error), ERROR)
        except click.ClickException as error:
            _print_json(ctx, error, error.format_message(), error.exit_code)
            raise
        except click.exceptions.Exit:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO):
                _end(ctx, error, f"cannot write the result ({error.strerror})", ERROR)
            if not isinstance(error, BrokenPipeError):
                _print_json(ctx, error, f"{type(error).__name__}: {error}", ERROR)
            raise
        except KeyboardInterrupt as error:
            after = "no file was left half-written, and the same command starts again"
            if ctx.invoked_subcommand in RESUMABLE:
                after = "the same command resumes where it stopped"
            _print_json(ctx, error, f"interrupted; {after}", INTERRUPTED)
            click.echo(f"karikomi: interrupted; {after}", err=True)
            ctx.exit(INTERRUPTED)


_AS_JSON = "karikomi.as_json"


def _end(ctx: click.Context, error: BaseException, text: str, code: int) -> None:
    _print_json(ctx, error, text, code)
    click.echo(f"karikomi: error: {text}", err=True)
    ctx.exit(code)


def _print_json(ctx: click.Context, error: BaseException, text: str, code: int) -> None:
    if ctx.meta[_AS_JSON]:
        kind = type(error).__name__
        click.echo(json.dumps({"error": text, "kind": kind, "exit_code": code}, indent=2))


def _show_version(ctx: click.Context, _: click.Parameter, requested: bool) -> None:
    if not requested or ctx.resilient_parsing:
        return
    from karikomi.cli.printing import show
    from karikomi.cli.versions import installation

    as_json = ctx.params["as_json"]
    show(installation() if as_json else {}, f"karikomi, version {__version__}", as_json)
    ctx.exit()


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="VERB [ARGS]...",
    epilog="Example: karikomi compress --out runs/first    (each verb has its own --help)",
)
# Eager, so that its value is there when the callback of --version runs, whatever the order of the two.
@click.option("--json", "as_json", is_flag=True, is_eager=True, help="With --version: print JSON.")
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    callback=_show_version,
    help="Print the version and exit; with --json also Python, packages, processor, threads.",
)
def main(as_json: bool) -> None:
    """Clip gradients, bound weights, and make networks small: prune, shrink, quantize, pack."""
    if as_json:
        raise click.UsageError(
            "before a verb --json needs --version; a verb's own follows the verb"
        )

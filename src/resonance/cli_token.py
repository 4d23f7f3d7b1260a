"""`resonance token …`: who may use the service."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from resonance.cli_data import Parser
from resonance.messages import _

if TYPE_CHECKING:
    from resonance.serve.tokens import Scope, Token


def create(argv: list[str]) -> int:
    parser = _parser("create", _("Make a token for the service. It is shown once."))
    parser.add_argument("--name", required=True, help=_("what it is for, such as a person or a program"))
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--patient", metavar="ID", help=_("it transcribes for this patient alone"))
    who.add_argument("--admin", action="store_true", help=_("it manages adapters, and transcribes for everybody"))
    who.add_argument("--base", action="store_true", help=_("it transcribes with the base model alone"))
    parser.add_argument("--days", type=float, help=_("days for which it is valid; left out, until it is revoked"))
    args = parser.parse_args(argv)
    from resonance.serve.tokens import TokenFile

    scope: Scope = "admin" if args.admin else "base" if args.base else "patient" if args.patient is not None else "all"
    file = TokenFile(args.tokens)
    token, secret = file.create(args.name, scope, patient=args.patient, days=args.days)
    # The secret alone goes to stdout: TOKEN=$(resonance token create --name phone)
    print(_("Token {name}: {what}").format(name=token.name, what=_what(token)), file=sys.stderr, flush=True)
    print(secret, flush=True)
    print(
        _("Write it down now: it is not stored, only a hash of it in {path}.").format(path=file.path), file=sys.stderr
    )
    return 0


def list_tokens(argv: list[str]) -> int:
    args = _parser("list", _("All tokens, by name and beginning.")).parse_args(argv)
    from resonance.serve.tokens import TokenFile

    tokens = TokenFile(args.tokens).tokens()
    for token in tokens:
        print(f"{token.prefix}…  {token.name}  {_what(token)}")
    if not tokens:
        print(_("There are no tokens. Make one: {command}").format(command="resonance token create --name …"))
    return 0


def revoke(argv: list[str]) -> int:
    parser = _parser("revoke", _("End a token. A service that is running notices within seconds."))
    parser.add_argument("which", metavar="NAME", help=_("name of the token, or its beginning"))
    args = parser.parse_args(argv)
    from resonance.serve.tokens import TokenFile

    token = TokenFile(args.tokens).revoke(args.which)
    print(_("Token {name}: {what}").format(name=token.name, what=_what(token)))
    return 0


def _what(token: Token) -> str:
    """What it opens and until when, in a line."""
    match token.scope:
        case "admin":
            opens = _("manages adapters, transcribes for everybody")
        case "all":
            opens = _("transcribes for everybody")
        case "patient":
            opens = _("transcribes for {patient}").format(patient=token.patient)
        case "base":
            opens = _("transcribes with the base model")
    if token.revoked:
        return _("{opens}; revoked {date}").format(opens=opens, date=token.revoked[:10])
    if token.expired:
        return _("{opens}; expired {date}").format(opens=opens, date=str(token.expires)[:10])
    if token.expires:
        return _("{opens}; until {date}").format(opens=opens, date=token.expires[:10])
    return opens


def _parser(name: str, description: str) -> Parser:
    parser = Parser(f"resonance token {name}", description)
    parser.add_argument("--tokens", type=Path, help=_("file with the tokens, if it is not the usual one"))
    return parser


COMMANDS: dict[str, Callable[[list[str]], int]] = {"create": create, "list": list_tokens, "revoke": revoke}

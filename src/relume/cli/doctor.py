"""`relume doctor`: what this machine has, lacks, and what to do about it. Needs no running node."""

from __future__ import annotations

from argparse import Namespace

from relume.cli.arguments import Parser
from relume.cli.client import state_directory
from relume.cli.render import Screen


def configure(parser: Parser) -> None:
    parser.runs(doctor)


def doctor(options: Namespace) -> int:
    from dataclasses import asdict

    from relume.node.doctor import examine

    findings = examine(state_directory())
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    for finding in findings:
        mark = {True: "✓", False: "✗", None: "!"}[finding.ok]
        lines.append(f"{mark} {finding.name:<{width}}  {finding.detail}")
        lines += [f"  {'':<{width}}  {line}" for line in finding.remedy.splitlines()]
    Screen(options.output).data([asdict(finding) for finding in findings], lines)
    return 1 if any(finding.ok is False for finding in findings) else 0

"""cachectl config: the settings in force."""

from __future__ import annotations

import click
from rich.text import Text

from modelcache.cachectl.rows import config_row
from modelcache.cachectl.session import Session, verb
from modelcache.cachectl.tables import new_table
from modelcache.units import printable


@click.command("config", epilog="Example: cachectl config --changed")
@click.option("--changed", is_flag=True, help="Only those that somebody has set.")
@verb
def config(session: Session, changed: bool) -> None:
    """Show the daemon's settings in force. Secrets are files; only their paths are shown."""
    answer = session.admin.config()
    settings = [each for each in answer.settings if not changed or each.value != each.default_value or each.next_value]
    if session.json:
        session.print_json(config_row(answer, settings))
        return
    table = new_table("SETTING", "VALUE", "DEFAULT", folds=("VALUE", "DEFAULT"))
    for each in settings:
        differs = each.value != each.default_value
        default = each.default_value if differs else "="
        table.add_row(
            Text(each.name), Text(printable(each.value)), Text(printable(default)), style="bold" if differs else ""
        )
        if each.next_value:
            table.add_row(Text("  from the next start"), Text(printable(each.next_value)), Text(), style="yellow")
    session.out.print(table)
    where = printable(answer.config_file) or "no file: environment, flags and defaults"
    session.say(f"from {where}; docs/configuration.md says what each means")

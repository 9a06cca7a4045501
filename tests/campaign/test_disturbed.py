"""Whatever disturbs a command: nothing is lost, silent, hung or a traceback."""

from __future__ import annotations

from tests.campaign.fifty import fifty_attacks_leave_no_fault, on_linux


@on_linux
def test_fifty_disturbed_commands_leave_no_fault() -> None:
    fifty_attacks_leave_no_fault("kills", "faults", "power", "signals")

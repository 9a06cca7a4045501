"""Whatever a command is given, and wherever it runs: nothing is lost, silent, hung, a traceback."""

from __future__ import annotations

from tests.campaign.fifty import fifty_attacks_leave_no_fault, on_linux


@on_linux
def test_fifty_awkward_files_and_places_leave_no_fault() -> None:
    fifty_attacks_leave_no_fault("damage", "hostile", "races", "places")

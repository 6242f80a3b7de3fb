"""Instruction data for people to look at: one page, without a network.

from ultrafuser_mega.looking import look

page = look([folder], folder / "page.html")
"""

from ultrafuser_mega.looking.look import look

__all__ = ["look"]

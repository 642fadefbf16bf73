"""What a page of the documentation tells people to type."""

import re


def blocks(page: str, language: str, mark: str = "") -> list[str]:
    """The fenced blocks of a page.

    Args:
        page: Its text.
        language: As behind the fence.
        mark: Only those right below a comment with this word; empty for all.
    """
    before = rf"<!-- {mark} -->\n" if mark else ""
    found = re.findall(rf"{before}^( *)```{language}\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def logical_lines(block: str) -> list[str]:
    """The commands of a block, each on one line."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def quoted(text: str) -> list[str]:
    """What stands between backticks in prose and tables, outside fenced blocks."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


def table_rows(text: str) -> list[list[str]]:
    """The cells of every table's rows, without heads and lines."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")]
            for line in text.splitlines() if line.startswith("| ")]  # fmt: skip
    lines = {at for at, row in enumerate(rows) if row[0].startswith("---")}
    return [row for at, row in enumerate(rows) if not {at, at + 1} & lines]

"""The tables of README.md, from the option table and the docstring; as a program, refreshes them."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import packtrack_logger  # noqa: E402


def readme_tables():
    """The README's tables in Markdown: {name: text}; each stands between <!-- name --> and <!-- /name -->."""
    rows = ["| flag | variable | default | what it does |", "|---|---|---|---|"]
    for option in packtrack_logger.OPTIONS:
        flags = [option.short] if option.short else []
        flags += [" ".join(filter(None, (option.flag, option.metavar)))]
        cells = [", ".join("`{}`".format(flag) for flag in flags)]
        cells += ["`{}`".format(cell) if cell else "" for cell in (option.variable, option.default)]
        cells += [option.help.replace("|", "\\|")]
        rows.append("| {} |".format(" | ".join(cells)))
    codes = ["| exit code | meaning |", "|---|---|"]
    codes += ["| {} | {} |".format(*row) for row in packtrack_logger.exit_codes()]
    return {"options": "\n".join(rows) + "\n", "exit-codes": "\n".join(codes) + "\n"}


def main():
    """Put the tables into README.md."""
    path = ROOT / "README.md"
    text = path.read_bytes().decode("utf-8")
    for name, table in readme_tables().items():
        pattern = "(<!-- {0} -->\n).*?(<!-- /{0} -->)".format(name)
        before, after = re.search(pattern, text, re.S).groups()
        text = re.sub(pattern, lambda match, new=before + table + after: new, text, flags=re.S)
    path.write_bytes(text.encode("utf-8"))


if __name__ == "__main__":
    main()

"""The tables of README.md, from the option table and the docstring; as a program, refreshes them."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import packtrack_logger  # noqa: E402


def readme_tables():
    """The README's tables in Markdown: {name: text}; each stands between <!-- name --> and <!-- /name -->."""
    options = ["| flag | variable | default | what it does |", "|---|---|---|---|"]
    for option in packtrack_logger.OPTIONS:
        flags = filter(None, (option.short, " ".join(filter(None, (option.flag, option.metavar)))))
        cells = [", ".join(map("`{}`".format, flags))]
        cells += ["`{}`".format(cell) if cell else "" for cell in (option.variable, option.default)]
        options.append("| {} |".format(" | ".join([*cells, option.help.replace("|", "\\|")])))
    codes = ["| exit code | meaning |", "|---|---|"]
    codes += ["| {} | {} |".format(*row)
              for row in re.findall(r"^  (\S+)  (.+)$", packtrack_logger.__doc__, re.MULTILINE)]
    return {"options": "\n".join(options) + "\n", "exit-codes": "\n".join(codes) + "\n"}


if __name__ == "__main__":
    text = (ROOT / "README.md").read_bytes().decode("utf-8")
    for name, table in readme_tables().items():
        first, _, rest = text.partition("<!-- %s -->\n" % name)
        end = "<!-- /%s -->" % name
        text = first + "<!-- %s -->\n" % name + table + end + rest.partition(end)[2]
    (ROOT / "README.md").write_bytes(text.encode("utf-8"))

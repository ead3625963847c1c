"""Fails where a page of a built site loads something from elsewhere: `check_site.py FOLDER`."""

import re
import sys
from pathlib import Path

LOADS = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|"""
                   r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|icon))[^>]*\bhref=["']?(?:https?:)?//|"""
                   r"""(?:@import|url\()\s*["']?(?:https?:)?//""")  # fmt: skip
root = Path(sys.argv[1])
pages = [path for path in root.rglob("*") if path.suffix in (".html", ".css")]
wrong = [
    f"{path.relative_to(root)}: {match.group(0)}"
    for path in pages
    for match in LOADS.finditer(path.read_text(encoding="utf-8"))
]
if wrong or not pages:
    sys.exit("\n".join(wrong) or f"{root} has no pages")
print(f"{len(pages)} pages and styles in {root} load nothing from elsewhere")

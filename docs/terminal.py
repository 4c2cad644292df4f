#!/usr/bin/env python3
"""Draws what a command printed as a picture of a terminal: docs/terminal.py COMMAND <OUTPUT >PICTURE.svg

docs/demo.svg is `ocifs demo 2>&1 | docs/terminal.py "ocifs demo" >docs/demo.svg`.
"""

import html
import sys

WIDTH, LINE, LEFT, TOP = 7.25, 18, 16, 42

lines = [f"$ {sys.argv[1]}"] + sys.stdin.read().rstrip().splitlines()
width = round(2 * LEFT + WIDTH * max(map(len, lines)))
height = TOP + LINE * len(lines) + 8
print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">')
print(f"  <title>{html.escape(sys.argv[1])}</title>")
print(f'  <rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>')
for at, colour in enumerate(["#ff5f56", "#ffbd2e", "#27c93f"]):
    print(f'  <circle cx="{20 + 18 * at}" cy="18" r="5.5" fill="{colour}"/>')
for number, line in enumerate(lines):
    colour = "#7ee787" if number == 0 else "#e6edf3"
    text = html.escape(line)
    print(f'  <text x="{LEFT}" y="{TOP + LINE * number + 12}" fill="{colour}" xml:space="preserve" textLength="{WIDTH * len(line):.0f}">{text}</text>')
print("</svg>")

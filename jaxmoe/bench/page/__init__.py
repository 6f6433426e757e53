"""The page of benchmarks: files of suites as one HTML file that needs nothing else.

result_files.py   the files that are shown
page_file.py      the whole page
race_bars.py      races
rooflines.py      what programs reach of what the machine can
growth_curves.py  how cost grows
published.py      what others published
"""

"""Data sources: where documents come from; one file and one line per source."""

from jaxmoe.data.sources.arrow import Arrow
from jaxmoe.data.sources.jsonl import Jsonl
from jaxmoe.data.sources.parquet import Parquet
from jaxmoe.data.sources.stdlib import Stdlib
from jaxmoe.data.sources.synthetic import Synthetic
from jaxmoe.data.sources.text_files import TextFiles

SOURCES = {
  "stdlib": (Stdlib, Stdlib(domain="prose", max_documents=8)),
  "text": (TextFiles, TextFiles(path=".")),
  "jsonl": (Jsonl, Jsonl(path=".")),
  "parquet": (Parquet, Parquet(path=".")),
  "arrow": (Arrow, Arrow(path=".")),
  "synthetic": (Synthetic, Synthetic(num_documents=8)),
}

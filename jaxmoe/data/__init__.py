"""Text to batches: sources -> mixture -> tokenizer -> packing -> stream.

`open_corpus` reads every source once, checks each record, splits off the held-out documents and
makes the tokenizer; `Corpus.stream` gives endless batches whose state can be saved and restored.
Every process runs the same global stream and keeps its rows, so one state serves any number of
processes. This package is the only importer of grain.
"""

from jaxmoe.data.chat_format import PlainChatFormat
from jaxmoe.data.corpus import Corpus, open_corpus
from jaxmoe.data.document import Document
from jaxmoe.data.loader_callbacks import LoaderCallbacks
from jaxmoe.data.mixture import Data, MixturePart
from jaxmoe.data.sources import SOURCES
from jaxmoe.data.stream import BatchStream
from jaxmoe.data.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer

__all__ = [
  "SOURCES",
  "TOKENIZERS",
  "BatchStream",
  "Corpus",
  "Data",
  "Document",
  "LoaderCallbacks",
  "MixturePart",
  "PlainChatFormat",
  "Tokenizer",
  "load_tokenizer",
  "open_corpus",
]

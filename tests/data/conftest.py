import os

import pytest
from synthetic_corpora import ListCorpus, make_documents

# Before huggingface_hub is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def corpus() -> ListCorpus:
    return ListCorpus(make_documents(120))

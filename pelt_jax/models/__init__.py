"""Linen reference models with Hugging Face module names, and loading of Hugging Face folders."""

from pelt_jax.models._attention import AttentionCore as AttentionCore
from pelt_jax.models._bart import BartForConditionalGeneration as BartForConditionalGeneration
from pelt_jax.models._bert import BertModel as BertModel
from pelt_jax.models._bert_lm import BertForMaskedLM as BertForMaskedLM
from pelt_jax.models._bert_lm import RobertaForMaskedLM as RobertaForMaskedLM
from pelt_jax.models._bert_tasks import (
  BertForSequenceClassification as BertForSequenceClassification,
)
from pelt_jax.models._bert_tasks import BertForTokenClassification as BertForTokenClassification
from pelt_jax.models._bert_tasks import (
  RobertaForSequenceClassification as RobertaForSequenceClassification,
)
from pelt_jax.models._config import DecoderConfig as DecoderConfig
from pelt_jax.models._config import EncoderConfig as EncoderConfig
from pelt_jax.models._config import read_config as read_config
from pelt_jax.models._config_gpt2 import GPT2Config as GPT2Config
from pelt_jax.models._config_seq2seq import BartConfig as BartConfig
from pelt_jax.models._config_seq2seq import T5Config as T5Config
from pelt_jax.models._families import from_config as from_config
from pelt_jax.models._gpt2 import GPT2ForSequenceClassification as GPT2ForSequenceClassification
from pelt_jax.models._gpt2 import GPT2ForTokenClassification as GPT2ForTokenClassification
from pelt_jax.models._gpt2 import GPT2LMHeadModel as GPT2LMHeadModel
from pelt_jax.models._gpt2 import GPT2Model as GPT2Model
from pelt_jax.models._layers import to_looped as to_looped
from pelt_jax.models._layers import to_scanned as to_scanned
from pelt_jax.models._llama import LlamaModel as LlamaModel
from pelt_jax.models._llama import RMSNorm as RMSNorm
from pelt_jax.models._llama_tasks import LlamaForCausalLM as LlamaForCausalLM
from pelt_jax.models._llama_tasks import (
  LlamaForSequenceClassification as LlamaForSequenceClassification,
)
from pelt_jax.models._llama_tasks import LlamaForTokenClassification as LlamaForTokenClassification
from pelt_jax.models._load import from_pretrained as from_pretrained
from pelt_jax.models._loss import token_losses as token_losses
from pelt_jax.models._names import torch_name as torch_name
from pelt_jax.models._save_folder import save_pretrained as save_pretrained
from pelt_jax.models._t5 import T5ForConditionalGeneration as T5ForConditionalGeneration

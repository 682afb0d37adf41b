"""What is compared in the outputs of transformers' models: tested on the models, without a Trainer."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from wmateacher import losses
from wmateacher.integrations.huggingface.comparison import align, read

BERT = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 16,
}  # fmt: skip
BART = {
    "vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
TOKENS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=0, eos_token_id=0,
        )
    ),
    "bert, causal": lambda: BertLMHeadModel(BertConfig(**BERT, is_decoder=True)),
    "bart's decoder": lambda: BartForCausalLM(BartConfig(**BART)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
    "masked": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "token classes": lambda: BertForTokenClassification(BertConfig(**BERT, num_labels=20)),
}  # fmt: skip


def build(make):
    torch.manual_seed(1)
    return make().eval()


def sentences():
    """Three sentences of 8 tokens with prompts and padding of different lengths."""
    tokens = torch.randint(3, 20, (3, 8), generator=torch.Generator().manual_seed(0))
    labels, real = tokens.clone(), torch.ones_like(tokens)
    for row, (prompt, end) in enumerate([(0, 8), (3, 6), (2, 5)]):
        labels[row, :prompt] = labels[row, end:] = -100
        real[row, end:] = 0
    return {"input_ids": tokens, "attention_mask": real, "labels": labels}


@pytest.mark.parametrize("name", TOKENS)
def test_the_positions_that_count_are_those_of_the_models_own_loss(name):
    model, inputs = build(TOKENS[name]), sentences()
    outputs = model(**inputs)
    compared = read(model, outputs, inputs)
    own = F.cross_entropy(compared.values[compared.mask], compared.labels[compared.mask])
    torch.testing.assert_close(own, outputs.loss)
    causal = name in ("gpt2", "llama", "bert, causal")  # in which nothing predicts the first label
    assert compared.mask.sum() == (inputs["labels"][:, 1 if causal else 0 :] != -100).sum()


def test_without_labels_the_real_tokens_count():
    model, inputs = build(TOKENS["llama"]), sentences()
    del inputs["labels"]
    compared = read(model, model(**inputs), inputs)
    assert compared.mask.sum(1).tolist() == [7, 5, 4]  # the next token of each is real, too
    with pytest.raises(
        ValueError, match=r"cannot tell which positions of the logits \[3, 8, 20\] count without"
    ):
        read(model, model(**inputs), {"input_ids": inputs["input_ids"]})


def test_labels_that_the_collator_has_shifted_are_not_shifted_again():
    model, inputs = build(TOKENS["llama"]), sentences()
    shifted = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    compared = read(model, model(**inputs), {**inputs, "shift_labels": shifted})
    assert torch.equal(compared.mask, shifted != -100)


def classifier(**options):
    return build(lambda: BertForSequenceClassification(BertConfig(**BERT, **options)))


def compare(model, other, inputs, distillation):
    pair = [read(m, m(**inputs), inputs) for m in (model, other)]
    return pair[0].kind, losses.build(distillation)(*(c.values for c in pair)).item()


@pytest.mark.parametrize("width", [1, 3])
def test_a_regression_compares_its_values(width):
    inputs = {**sentences(), "labels": torch.randn(3, width).squeeze(-1)}
    model, other = (classifier(num_labels=width, problem_type="regression") for _ in range(2))
    torch.nn.init.normal_(other.classifier.weight)
    difference = model(**inputs).logits - other(**inputs).logits
    kind, term = compare(model, other, inputs, "mse(logits)")
    assert (kind, term) == ("values", pytest.approx(difference.square().mean().item()))


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_the_labels_of_a_multi_label_model_are_compared_one_by_one(problem):
    inputs = {**sentences(), "labels": torch.ones(3, 4)}
    model, other = (classifier(num_labels=4, problem_type=problem) for _ in range(2))
    torch.nn.init.normal_(other.classifier.weight)
    q, p = (m(**inputs).logits.double().sigmoid() for m in (model, other))
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    kind, term = compare(model, other, inputs, "kl")
    assert (kind, term) == ("labels", pytest.approx(expected.item(), rel=1e-4))


def test_classes_and_choices_compare_one_distribution_a_row():
    inputs = {**sentences(), "labels": torch.tensor([1, -100, 0])}
    model = classifier(num_labels=3)
    assert read(model, model(**inputs), inputs).mask.tolist() == [True, False, True]
    choices = {k: torch.stack([v, v], 1) for k, v in sentences().items()}
    choices["labels"] = torch.tensor([0, 1, 1])
    model = build(lambda: BertForMultipleChoice(BertConfig(**BERT)))
    assert read(model, model(**choices), choices).values.shape == (3, 2)


def test_an_image_text_model_compares_its_embeddings():
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 20, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    model = build(lambda: CLIPModel(config))
    inputs = sentences() | {"pixel_values": torch.randn(3, 3, 8, 8), "return_loss": True}
    del inputs["labels"]
    compared = read(model, model(**inputs), inputs)
    own = losses.info_nce(*compared.values)
    torch.testing.assert_close(own, model(**inputs).loss, rtol=1e-4, atol=1e-5)
    own.backward()
    assert model.logit_scale.grad is not None


def test_the_ends_of_an_answer_are_compared_over_the_real_tokens():
    model = build(lambda: BertForQuestionAnswering(BertConfig(**BERT)))
    other = build(lambda: BertForQuestionAnswering(BertConfig(**BERT)))
    torch.nn.init.normal_(other.qa_outputs.weight)
    terms = []
    for pads in (0, 5):
        inputs = {"input_ids": F.pad(sentences()["input_ids"], (0, pads)), "attention_mask": torch.ones(3, 8)}
        inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, pads))
        terms.append(compare(model, other, inputs, "kl")[1])
    assert terms[1] == pytest.approx(terms[0], rel=1e-5)
    assert terms[0] > 1e-3


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        ({"last_hidden_state": torch.zeros(3, 8, 2)}, None, "cannot tell which outputs of .* last_hidden_state"),
        ({"logits": torch.zeros(3, 8, 2), "pred_boxes": torch.zeros(3, 8, 4)}, None, "among logits, pred_boxes"),
        ({"logits": torch.zeros(3, 5, 2)}, torch.zeros(3, 4, dtype=int), r"shape \[3, 4\], .*\[3, 5, 2\] count"),
        ({"logits": torch.zeros(3, 5)}, torch.zeros(3, 5), "do not say which positions"),
        ({"logits": torch.zeros(3, 5, 2)}, [{"boxes": []}], r"the labels \(list\)"),
        ((torch.zeros(()),), None, "the model returned a tuple, not the loss and the logits"),
    ],
)  # fmt: skip
def test_outputs_that_cannot_be_compared_are_named(outputs, labels, message):
    with pytest.raises(ValueError, match=message) as error:
        read(torch.nn.Identity(), outputs, {"labels": labels})
    assert "override outputs_to_compare" in str(error.value)


def test_a_model_with_two_heads_and_one_without_a_scale_are_refused():
    model, inputs = build(lambda: BertForPreTraining(BertConfig(**BERT))), sentences()
    with pytest.raises(ValueError, match="prediction_logits, seq_relationship_logits"):
        read(model, model(input_ids=inputs["input_ids"]), inputs)
    embeds = torch.zeros(2, 3)
    outputs = {"image_embeds": embeds, "text_embeds": embeds, "logits_per_image": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="Identity has no logit_scale"):
        read(torch.nn.Identity(), outputs, {})


# --- two views of a batch -----------------------------------------------------------------------------


def view(inputs, context):
    """The same sentences after a context, padded at the left."""
    length = context.shape[1]
    return {
        "input_ids": torch.cat([context, inputs["input_ids"]], 1),
        "attention_mask": F.pad(inputs["attention_mask"], (length, 0), value=1),
        "labels": F.pad(inputs["labels"], (length, 0), value=-100),
    }


def test_views_of_different_length_are_aligned_by_the_answer():
    model, inputs = build(TOKENS["llama"]), sentences()
    inputs["labels"][:, 0] = -100
    longer = view(inputs, torch.randint(3, 20, (3, 4), generator=torch.Generator().manual_seed(2)))
    student, teacher = (read(model, model(**i), i) for i in (inputs, longer))
    aligned = align(student, teacher)
    logits = model(**longer).logits[:, 4:]  # an answer moves by the length of the context
    torch.testing.assert_close(aligned.values[student.mask], logits[student.mask])
    assert torch.equal(aligned.mask, student.mask)


def test_views_that_cannot_be_aligned_say_why():
    model, inputs = build(TOKENS["llama"]), sentences()
    inputs["labels"][:, 0] = -100
    student = read(model, model(**inputs), inputs)

    def other(change):
        longer = view(inputs, torch.full((3, 2), 5))
        change(longer)
        return read(model, model(**longer), longer)

    with pytest.raises(
        ValueError, match="row 1 of the teacher's view has 2 answer tokens and the student's 3"
    ):
        align(student, other(lambda v: v["labels"][1].__setitem__(7, -100)))
    with pytest.raises(ValueError, match="answers in the teacher's view are other tokens"):
        align(student, other(lambda v: v["labels"][1].__setitem__(7, 2)))
    with pytest.raises(ValueError, match="must return labels in which the answer is marked"):
        align(student, other(lambda v: v.pop("labels")))
    with pytest.raises(ValueError, match="must keep the batch of 3 rows, got 2"):
        align(student, other(lambda v: v.update({k: x[:2] for k, x in v.items()})))
    with pytest.raises(ValueError, match="the teacher's view gives 'values' and the student's 'classes'"):
        align(student, read(classifier(num_labels=1), {"logits": torch.zeros(3, 1)}, {}))

"""Every loss once more, in float64 NumPy with loops and explicit softmax: obvious, slow, independent.

Paired losses take (image [B, d], text [B, d], scale) tuples, the others arrays.
"""

import math

import numpy as np


def softmax(row):
    weights = [math.exp(v - max(row)) for v in row]
    return [w / sum(weights) for w in weights]


def cross_entropy(target, row):
    return -sum(t * math.log(p) for t, p in zip(target, softmax(row), strict=True))


def kl_row(teacher_row, student_row):
    p, q = softmax(teacher_row), softmax(student_row)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def unit(rows):
    return [np.asarray(r) / math.sqrt(sum(v * v for v in r)) for r in rows]


def similarities(anchors, candidates, scale):
    return [[float(scale) * float(np.dot(a, c)) for c in unit(candidates)] for a in unit(anchors)]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def rows_of(logits):
    logits = np.asarray(logits)
    return logits.reshape(-1, logits.shape[-1])


def directions(embeddings):
    image, text, scale = embeddings
    return [similarities(image, text, scale), similarities(text, image, scale)]


def own_label(logits):
    one_hot = np.eye(len(logits))
    return mean(cross_entropy(one_hot[i], row) for i, row in enumerate(logits))


def info_nce(embeddings):
    return 0.5 * sum(own_label(logits) for logits in directions(embeddings))


def fd(student, teacher):
    total = 0.0
    for own, target in zip(student[:2], teacher[:2], strict=True):
        total += mean(sum((a - b) ** 2) for a, b in zip(unit(own), unit(target), strict=True))
    return total


def temperature_kl(student, teacher, temperature=1.0):
    total = 0.0
    for own, target in zip(directions(student), directions(teacher), strict=True):
        total += mean(kl_row([v / temperature for v in t], s) for s, t in zip(own, target, strict=True))
    return 0.5 * total


def crossed(student, teacher):
    return [
        similarities(student[0], teacher[1], student[2]),
        similarities(student[1], teacher[0], student[2]),
    ]


def icl(student, teacher):
    return 0.5 * sum(own_label(logits) for logits in crossed(student, teacher))


def cross_kd(student, teacher):
    total = 0.0
    for own, target in zip(crossed(student, teacher), directions(teacher), strict=True):
        total += mean(kl_row(t, s) for s, t in zip(own, target, strict=True))
    return 0.5 * total


def paired_ce(student, teacher):
    total = 0.0
    for own, target in zip(directions(student), directions(teacher), strict=True):
        total += mean(cross_entropy(softmax(t), s) for s, t in zip(own, target, strict=True))
    return total


def info_nce_gradients(embeddings):
    """dL/dI and dL/dT by the chain rule, one logit at a time."""
    image, text, scale = unit(embeddings[0]), unit(embeddings[1]), float(embeddings[2])
    size = len(image)
    image_to_text, text_to_image = directions(embeddings)
    d_image, d_text = np.zeros_like(image), np.zeros_like(text)
    for i in range(size):
        for j in range(size):
            d_row = (softmax(image_to_text[i])[j] - (i == j)) / (2 * size)
            d_column = (softmax(text_to_image[j])[i] - (i == j)) / (2 * size)
            d_image[i] += (d_row + d_column) * scale * text[j]
            d_text[j] += (d_row + d_column) * scale * image[i]
    return d_image, d_text


def gd(student, teacher):
    pairs = zip(info_nce_gradients(student), info_nce_gradients(teacher), strict=True)
    return sum(mean(((a - b) ** 2).ravel()) for a, b in pairs)


def afd(student, teacher, image_weight, text_weight):
    fused = []
    for k, weight in enumerate((image_weight, text_weight)):
        both = zip(unit(student[k]), unit(teacher[k]), strict=True)
        fused.append([weight @ np.concatenate(pair) for pair in both])
    return info_nce((*fused, student[2]))


def ce(student, teacher):
    pairs = zip(rows_of(student), rows_of(teacher), strict=True)
    return mean(cross_entropy(softmax(t), s) for s, t in pairs)


def buckets(own, target, top_k, tail, largest):
    """Two rows of logits, of which the `top_k` largest of one of them and, with a tail, the rest as one entry."""
    chosen = sorted(range(len(own)), key=lambda c: -largest[c])[:top_k]
    rest = [c for c in range(len(own)) if c not in chosen]

    def reduced(row):
        kept = [row[c] for c in chosen]
        return [*kept, math.log(sum(math.exp(row[c]) for c in rest))] if tail and rest else kept

    return reduced(own), reduced(target)


def tempered(student, teacher, divergence, temperature=1.0, top_k=None, tail=True, support="teacher"):
    values = []
    for own, target in zip(rows_of(student), rows_of(teacher), strict=True):
        if top_k is not None:
            # The order of the logits is that of the logits divided by the temperature.
            largest = own if support == "student" else target
            own, target = buckets(own / temperature, target / temperature, top_k, tail, largest)
        else:
            own, target = own / temperature, target / temperature
        values.append(divergence(own, target))
    return temperature**2 * mean(values)


def jensen_shannon_row(own, target, beta):
    q, p = softmax(own), softmax(target)
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    to_mixture = [sum(x * math.log(x / y) for x, y in zip(side, m, strict=True)) for side in (p, q)]
    return beta * to_mixture[0] + (1 - beta) * to_mixture[1]


def kl(student, teacher, *given, **parameters):
    return tempered(student, teacher, lambda own, target: kl_row(target, own), *given, **parameters)


def reverse_kl(student, teacher, *given, **parameters):
    return tempered(student, teacher, kl_row, *given, **{"support": "student", **parameters})


def jsd(student, teacher, beta=0.5, *given, **parameters):
    def divergence(own, target):
        return jensen_shannon_row(own, target, beta)

    return tempered(student, teacher, divergence, *given, **{"support": "student", **parameters})


def mse(student, teacher, space="probabilities"):
    squares = []
    for s, t in zip(rows_of(student), rows_of(teacher), strict=True):
        pair = (s, t) if space == "logits" else (softmax(s), softmax(t))
        squares += [(a - b) ** 2 for a, b in zip(*pair, strict=True)]
    return mean(squares)


def dino(student, teacher, center, student_temperature=0.1, teacher_temperature=0.04):
    pairs = zip(rows_of(student), rows_of(teacher), strict=True)
    return mean(
        cross_entropy(softmax((t - center) / teacher_temperature), s / student_temperature) for s, t in pairs
    )


def feature_mse(student, teacher):
    return mean((a - b) ** 2 for a, b in zip(student.ravel(), teacher.ravel(), strict=True))


def cosine(student, teacher):
    pairs = zip(unit(rows_of(student)), unit(rows_of(teacher)), strict=True)
    return mean(1 - sum(a * b) for a, b in pairs)


def info_nce_of_features(student, teacher, temperature=0.2):
    rows, candidates = unit(rows_of(student)), unit(rows_of(teacher))
    logits = [np.array([sum(a * b) / temperature for b in candidates]) for a in rows]
    return mean(-math.log(softmax(row)[i]) for i, row in enumerate(logits))


def relational(student, teacher):
    def relative(features):
        rows = features.reshape(len(features), -1)
        distances = [
            math.sqrt(sum((rows[i] - rows[j]) ** 2))
            for i in range(len(rows))
            for j in range(i + 1, len(rows))
        ]
        return [d / mean(distances) for d in distances]

    def huber(x):
        return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5

    pairs = zip(relative(student), relative(teacher), strict=True)
    return mean(huber(a - b) for a, b in pairs)


def gradient(function, x, step=1e-6):
    """Central finite differences of a scalar function of one array."""
    x = np.array(x, dtype=np.float64)
    result = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        result[index] = (function(up) - function(down)) / (2 * step)
    return result


# Registered name -> its oracle.
ORACLES = {
    "afd": afd,
    "ce": ce,
    "cosine": cosine,
    "crd": temperature_kl,
    "cross_kd": cross_kd,
    "dino": dino,
    "fd": fd,
    "feature_mse": feature_mse,
    "gd": gd,
    "icl": icl,
    "info_nce": info_nce_of_features,
    "jsd": jsd,
    "kl": kl,
    "mse": mse,
    "paired_ce": paired_ce,
    "relational": relational,
    "reverse_kl": reverse_kl,
    "temperature_kl": temperature_kl,
}

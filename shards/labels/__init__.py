"""Label sets: tables keyed by utterance that say what features mean. They can be replaced without encoding again."""

"""Operations on a stream of documents: each takes documents and gives those that pass, in order."""

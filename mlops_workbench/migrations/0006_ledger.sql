-- What an entry says, in the exact words that its digest covers: checking the chain is then hashing text, whatever wrote it.
-- The other columns repeat it for searching, and verifying compares them. Entries from before have no text: theirs is made again.
ALTER TABLE exp.ledger ADD COLUMN said text;

-- Who decided about a policy, newest first: what explaining a past answer looks for.
CREATE INDEX ledger_by_policy ON exp.ledger ((subject ->> 'policy'), held_from DESC, seq DESC)
    WHERE subject ->> 'policy' IS NOT NULL;
CREATE INDEX ledger_by_experiment ON exp.ledger ((subject ->> 'experiment'), held_from DESC, seq DESC)
    WHERE subject ->> 'experiment' IS NOT NULL;

-- Rows are read and added, nothing else: not even by the role that owns the table, unless it first grants itself the right again.
-- A superuser goes around grants and triggers alike; that is what the chain and the anchors outside the database are for.
REVOKE UPDATE, DELETE, TRUNCATE ON exp.ledger FROM PUBLIC;
REVOKE UPDATE, DELETE, TRUNCATE ON exp.ledger FROM CURRENT_USER;

-- A chain cannot forget, so it never holds a unit's id: it holds a digest salted with what stands here. Deleting a unit's row
-- leaves a digest that nothing leads back to the unit.
CREATE TABLE exp.unit_salts (
    unit_type text NOT NULL,
    unit_id text NOT NULL,
    salt bytea NOT NULL,
    PRIMARY KEY (unit_type, unit_id)
);

-- Where models and policies stand, as one truth that a single transaction can change; MLflow's tags and aliases follow it.
ALTER TABLE exp.policies
    ADD COLUMN revision bigint NOT NULL DEFAULT 0,
    ADD COLUMN projected bigint NOT NULL DEFAULT 0;

-- entry: the ledger's entry by which this version last came into production; it orders what served before what.
ALTER TABLE exp.policy_versions
    ADD COLUMN model_digest text,
    ADD COLUMN author text NOT NULL DEFAULT '',
    ADD COLUMN entry bigint,
    ADD CHECK (status IN ('candidate', 'experiment', 'production', 'retired', 'rolled_back'));

UPDATE exp.policy_versions v
SET model_digest = e.subject ->> 'digest', author = e.actor, entry = e.seq
FROM (
    SELECT DISTINCT ON (subject ->> 'policy', subject ->> 'version') *
    FROM exp.ledger WHERE action = 'policy.promote'
    ORDER BY subject ->> 'policy', subject ->> 'version', seq DESC
) AS e
WHERE e.subject ->> 'policy' = v.policy AND e.subject ->> 'version' = v.version::text;

CREATE TABLE exp.model_stages (
    model_name text NOT NULL,
    model_version integer NOT NULL,
    digest text NOT NULL,
    stage text NOT NULL CHECK (
        stage IN ('trained', 'candidate', 'experiment', 'production', 'archived', 'rejected', 'rolled_back')
    ),
    entry bigint NOT NULL,
    PRIMARY KEY (model_name, model_version)
);

CREATE UNIQUE INDEX one_production_model ON exp.model_stages (model_name) WHERE stage = 'production';

-- A promotion that was cut short left the policy ahead of the model's stage: the policy is what served.
INSERT INTO exp.model_stages (model_name, model_version, digest, stage, entry)
SELECT last.model, last.version, last.digest,
    CASE
        WHEN serving.model_version IS NOT NULL THEN 'production'
        WHEN last.stage = 'production' THEN 'archived'
        ELSE last.stage
    END,
    last.seq
FROM (
    SELECT DISTINCT ON (subject ->> 'model', subject ->> 'version')
        subject ->> 'model' AS model, (subject ->> 'version')::integer AS version, subject ->> 'digest' AS digest,
        substr(action, 7) AS stage, seq
    FROM exp.ledger
    WHERE action IN ('model.trained', 'model.candidate', 'model.production', 'model.archived', 'model.rejected')
        AND subject ?& ARRAY['model', 'version', 'digest']
    ORDER BY subject ->> 'model', subject ->> 'version', seq DESC
) AS last
LEFT JOIN exp.policy_versions AS serving
    ON serving.status = 'production' AND serving.model_name = last.model AND serving.model_version = last.version::text;

-- planner@3 is a name for what it says, for ever: only its status moves.
CREATE FUNCTION exp.refuse_policy_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%@% says for ever what it says: propose another version instead of % on it', OLD.policy, OLD.version, TG_OP;
END
$$;

CREATE TRIGGER policy_versions_are_immutable BEFORE UPDATE ON exp.policy_versions
    FOR EACH ROW WHEN (
        (OLD.policy, OLD.version, OLD.model_name, OLD.model_version, OLD.model_digest, OLD.settings, OLD.author)
        IS DISTINCT FROM
        (NEW.policy, NEW.version, NEW.model_name, NEW.model_version, NEW.model_digest, NEW.settings, NEW.author)
    ) EXECUTE FUNCTION exp.refuse_policy_change();

CREATE TRIGGER policy_versions_stay BEFORE DELETE ON exp.policy_versions
    FOR EACH ROW EXECUTE FUNCTION exp.refuse_policy_change();

-- Whoever follows a policy hears of a change with the transaction that made it, and can see cheaply that there was one.
CREATE FUNCTION exp.announce_policy() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE exp.policies SET revision = revision + 1 WHERE policy = NEW.policy;
    PERFORM pg_notify('workbench_policy', NEW.policy);
    RETURN NULL;
END
$$;

CREATE TRIGGER policy_is_announced AFTER INSERT OR UPDATE OF status ON exp.policy_versions
    FOR EACH ROW EXECUTE FUNCTION exp.announce_policy();

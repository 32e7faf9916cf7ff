-- Keys of the service: the secret is shown once and only its digest is kept, so whoever reads this table can call nothing.
CREATE TABLE exp.api_keys (
    key_id text PRIMARY KEY CHECK (key_id ~ '^[0-9a-z]{12}$'),
    name text NOT NULL CHECK (name ~ '^[a-z0-9][a-z0-9_.-]{0,62}$'),
    scope text NOT NULL CHECK (scope IN ('client', 'operator', 'admin')),
    secret_sha256 bytea NOT NULL CHECK (octet_length(secret_sha256) = 32),
    created_at timestamptz NOT NULL,
    created_by text NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz,
    CHECK (expires_at IS NULL OR expires_at >= created_at)
);

CREATE INDEX api_keys_by_name ON exp.api_keys (name);

-- What a key is never changes, its end only comes nearer, and what was revoked stays revoked.
CREATE FUNCTION exp.guard_api_key() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'UPDATE' THEN
        RAISE EXCEPTION '% on exp.api_keys is refused: revoke keys instead, the ledger names them', TG_OP;
    END IF;
    IF (NEW.key_id, NEW.name, NEW.scope, NEW.secret_sha256, NEW.created_at, NEW.created_by)
       IS DISTINCT FROM (OLD.key_id, OLD.name, OLD.scope, OLD.secret_sha256, OLD.created_at, OLD.created_by) THEN
        RAISE EXCEPTION 'key % is what it was made: make another one', OLD.key_id;
    END IF;
    IF OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS DISTINCT FROM OLD.revoked_at THEN
        RAISE EXCEPTION 'key % was revoked: make another one', OLD.key_id;
    END IF;
    IF OLD.expires_at IS NOT NULL AND (NEW.expires_at IS NULL OR NEW.expires_at > OLD.expires_at) THEN
        RAISE EXCEPTION 'key % expires: rotate it instead of giving it more time', OLD.key_id;
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER api_key_is_guarded BEFORE UPDATE OR DELETE ON exp.api_keys
    FOR EACH ROW EXECUTE FUNCTION exp.guard_api_key();

CREATE TRIGGER api_keys_are_not_emptied BEFORE TRUNCATE ON exp.api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION exp.guard_api_key();

-- What the planner's application keeps beside its events. A validity range [valid_from, valid_until) lets a past state be
-- read; NULL means that it lasts.
CREATE TABLE exp.planner_histories (
    source text PRIMARY KEY,
    seed bigint NOT NULL,
    n_decisions bigint NOT NULL
);

CREATE TABLE exp.recipes (
    recipe_id text NOT NULL,
    valid_from timestamptz NOT NULL,
    valid_until timestamptz CHECK (valid_until > valid_from),
    name text NOT NULL,
    cuisine text NOT NULL,
    minutes integer NOT NULL CHECK (minutes > 0),
    price_eur double precision NOT NULL CHECK (price_eur >= 0),
    ingredients jsonb NOT NULL,
    food_groups jsonb NOT NULL,
    kid_friendly boolean NOT NULL,
    popularity_rank integer NOT NULL,
    PRIMARY KEY (recipe_id, valid_from)
);

CREATE TABLE exp.households (
    household_id text NOT NULL,
    valid_from timestamptz NOT NULL,
    valid_until timestamptz CHECK (valid_until > valid_from),
    size integer NOT NULL CHECK (size > 0),
    diet text NOT NULL,
    allergies jsonb NOT NULL,
    budget text NOT NULL,
    minutes integer NOT NULL CHECK (minutes > 0),
    likes jsonb NOT NULL,
    PRIMARY KEY (household_id, valid_from)
);

CREATE TABLE exp.pantries (
    household_id text NOT NULL,
    valid_from timestamptz NOT NULL,
    valid_until timestamptz CHECK (valid_until > valid_from),
    items jsonb NOT NULL,
    PRIMARY KEY (household_id, valid_from)
);

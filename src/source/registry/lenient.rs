//! Fields of JSON documents as registries and other tools write them: `null` for what is empty, numbers with a fraction of zero.
//! In: what serde finds. Out: the field's value; an error where there is none.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::digest::Digest;

/// What Go writes for something empty is `null` as well.
pub(super) fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The same for every value of a map.
pub(super) fn nulls_are_empty<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let map: Option<BTreeMap<String, Option<String>>> = Option::deserialize(deserializer)?;
    let pairs = map.unwrap_or_default().into_iter();
    Ok(pairs.map(|(key, value)| (key, value.unwrap_or_default())).collect())
}

/// The texts among an object's values; of anything else there are none. For what an image can be used without.
pub(super) fn texts_of_an_object<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let serde_json::Value::Object(object) = serde_json::Value::deserialize(deserializer)? else {
        return Ok(BTreeMap::new());
    };
    let text = |(key, value)| match value {
        serde_json::Value::String(text) => Some((key, text)),
        _ => None,
    };
    Ok(object.into_iter().filter_map(text).collect())
}

/// A digest whose hexadecimal digits some tools write in upper case.
pub(super) fn digest_in_any_case<'de, D>(deserializer: D) -> Result<Digest, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    text.to_ascii_lowercase().parse().map_err(serde::de::Error::custom)
}

/// A number that tools without integers write with a fraction of zero.
pub(super) fn whole_number<'de, D>(deserializer: D) -> Result<u64, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let number = serde_json::Number::deserialize(deserializer)?;
    let text = number.to_string();
    let whole = text.strip_suffix(".0").unwrap_or(&text);
    whole
        .parse()
        .map_err(|_| serde::de::Error::custom(format!("{text} is no length in bytes")))
}
